"""Serving over vLLM: every scheme loads and answers as in transformers; the page and the API over an engine in the process
and over a server; 64 users at once; an engine that dies. vLLM runs in an environment of its own, .venv-vllm."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
import torch
from conftest import MINIATURE, ROOT
from playwright.sync_api import expect
from test_host_page import ask, browser, give  # noqa: F401

UPLOADS = os.environ["GRADIO_TEMP_DIR"]  # of the first host, which test_host_page imports: two never share a process
import llava_gradio_lora_host_quantized as serving

os.environ["GRADIO_TEMP_DIR"] = UPLOADS
from llava_orpo_training import build_prompt, generate_answers, load_image, load_llava

SCRIPT = ROOT / "llava_gradio_lora_host_quantized.py"
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PICTURES = sorted((MINIATURE / "amber" / "image").glob("*.webp"))
CAPTION = "Describe this image."
needs_vllm = pytest.mark.skipif(
    not PYTHON.exists() and "CI" not in os.environ, reason="no .venv-vllm here: make test makes it"
)
SCREENSHOTS = os.environ.get("SCREENSHOTS")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(command, log, sentence, seconds=180):
    """Start a process of .venv-vllm and wait until its log says that it serves."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen([str(PYTHON), *map(str, command)], stdout=file, stderr=file, env=environment, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + seconds
    while sentence not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    return process


def end(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The merged checkpoint, under a name that says that it is to be computed in float32."""
    folder = tmp_path_factory.mktemp("float32") / "quantized_models" / "miniature-BF16"
    shutil.copytree(made["BF16"], folder)
    return folder


@pytest.fixture(scope="module")
def model_server(made, tmp_path_factory):
    """`vllm serve` with the FP8 checkpoint: its address."""
    port = free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", made["FP8_DYNAMIC"], "--port", port, "--enforce-eager",
               "--limit-mm-per-prompt", '{"image": 1}', "--api-key", "secret", "--skip-mm-profiling"]  # fmt: skip
    os.environ["OPENAI_API_KEY"] = "secret"
    process = start(command, tmp_path_factory.mktemp("logs") / "server.log", "Application startup complete")
    yield f"http://127.0.0.1:{port}"
    end(process)
    del os.environ["OPENAI_API_KEY"]


@pytest.fixture(scope="module")
def served(whole, model_server, tmp_path_factory):
    """The page: the merged checkpoint in the process, FP8 on the server beside it. (process, address, log)"""
    port, log = free_port(), tmp_path_factory.mktemp("logs") / "page.log"
    command = [SCRIPT, "--model_path", whole, "--server_url", model_server, "--port", port, "--max_num_seqs", "16",
               "--dtype", "float32"]  # fmt: skip
    process = start(command, log, "Ctrl+C ends it")
    yield process, f"http://127.0.0.1:{port}", log
    end(process)


@pytest.fixture(scope="module")
def wanted():
    """What transformers answers, base + adapter, float32."""
    model, processor = load_llava(str(MINIATURE / "model"), str(MINIATURE / "adapter"))
    images = [load_image(picture) for picture in PICTURES]
    captions = generate_answers(model, processor, images[:32], [CAPTION] * 32, 60)
    denials = generate_answers(model, processor, images[:32], ["Is there a cup in this image?"] * 32, 60)
    return {CAPTION: captions, "Is there a cup in this image?": denials}


@needs_vllm
def test_vllm_answers_as_transformers_in_every_scheme(made, whole, tmp_path):
    """FP8_BLOCK is not among them: vLLM has no kernel for it on a CPU."""
    folders = {"float32": whole} | {scheme: made[scheme] for scheme in ("FP8_DYNAMIC", "W8A8", "W4A16")}
    command = [
        PYTHON,
        ROOT / "tests" / "run_vllm.py",
        json.dumps([str(path) for path in PICTURES[:20]]),
        tmp_path / "answers.json",
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*map(str, command), *map(str, folders.values())], check=True, timeout=500, env=environment)
    answers = json.loads((tmp_path / "answers.json").read_text())
    images = [load_image(picture) for picture in PICTURES[:20]]
    for scheme, folder in folders.items():
        model, processor = load_llava(str(folder))
        assert len(answers[str(folder)]) == 20
        gaps = []
        for image, answer in zip(images, answers[str(folder)], strict=True):
            prompt, pixels = (
                build_prompt(processor, CAPTION, image.size),
                processor.image_processor(image, return_tensors="pt"),
            )
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer["tokens"]]), image_sizes=pixels["image_sizes"],
                               pixel_values=pixels["pixel_values"].to(model.dtype)).logits[0]  # fmt: skip
            scores = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            gaps.append(
                (
                    scores.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0] - torch.tensor(answer["logprobs"])
                ).abs()
            )
        texts = [answer["text"] for answer in answers[str(folder)]]
        same = sum(
            a == b for a, b in zip(texts, generate_answers(model, processor, images, [CAPTION] * 20, 60), strict=True)
        )
        gap = torch.cat(gaps).mean().item()
        print(f"{scheme}: {same} of 20 captions the same, log-probabilities {gap:.5f} apart")
        assert (same == 20 and gap < 1e-4) if scheme == "float32" else (same >= 14 and gap < 0.05), (scheme, same, gap)


@needs_vllm
def test_ambers_script_runs_on_the_quantized_checkpoint(made, tmp_path):
    command = ["llava_amber_validation_benchmark_with_lora.py", "--test_mode", "--backend", "vllm", "--evaluation_type", "g",
               "--limit", "20", "--nouns", "vocabulary", "--output_file"]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = [str(PYTHON), *command, str(tmp_path / "vllm" / "results.json"), "--model_path", str(made["FP8_DYNAMIC"])]
    subprocess.run(run, check=True, timeout=300, cwd=ROOT, env=environment)
    plain = [
        sys.executable,
        *command,
        str(tmp_path / "plain" / "results.json"),
        "--lora_path",
        str(MINIATURE / "adapter"),
    ]
    plain[plain.index("vllm")] = "transformers"
    subprocess.run(plain, check=True, timeout=300, cwd=ROOT)
    answers = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("vllm", "plain")]
    assert len(answers[0]) == 20 and sum(a == b for a, b in zip(*answers, strict=True)) >= 14
    scores = [
        json.loads((tmp_path / folder / "scores.json").read_text())["strict"]["generative"]
        for folder in ("vllm", "plain")
    ]
    assert abs(scores[0]["cover"] - scores[1]["cover"]) < 6


@needs_vllm
def test_vllm_knows_the_readmes_flags():
    """Every `vllm serve` of the README, as its own parser reads it."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ").replace("…", "folder")
    lines = [line for line in re.findall(r"vllm serve ([^`\n]+)", text) if "--" in line]
    assert len(lines) >= 3
    program = """if 1:
        import shlex, sys
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        parser = make_arg_parser(FlexibleArgumentParser())
        for line in sys.argv[1:]:
            args = parser.parse_args(shlex.split(line))
            print(args.model_tag, args.limit_mm_per_prompt, args.distributed_executor_backend, args.allowed_media_domains)"""
    run = subprocess.run([str(PYTHON), "-c", program, *lines], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "{'image': 1}" in run.stdout and " ray " in run.stdout and "upload.wikimedia.org" in run.stdout


@needs_vllm
def test_the_servers_prompt_is_the_trained_one(made, model_server):
    """Token for token, whoever sends plain messages: BOS, one picture, the answers of earlier turns."""
    processor = serving_processor(made["FP8_DYNAMIC"])
    server = serving.Server(model_server)
    assert not server.lacks_bos
    client = openai.OpenAI(base_url=f"{model_server}/v1", api_key="secret")
    image = load_image(PICTURES[3])
    tokens = processor.tokenizer(" The image shows a tree.", add_special_tokens=False).input_ids + [2]
    for question in (CAPTION, "Is there\n a chair, please?", "日本語 🎉"):
        for earlier in ([], [(CAPTION, serving.Answer("The image shows a tree.", tokens))]):
            messages = server.write_prompt(serving.ShownPicture(image, 0), question, earlier)
            reply = client.chat.completions.create(model=server.model, messages=messages, max_completion_tokens=2,
                                                   extra_body={"return_token_ids": True})  # fmt: skip
            ids = serving.build_chat(processor, image.size, question, [(old, answer.tokens) for old, answer in earlier])
            assert reply.model_dump()["prompt_token_ids"] == ids


def serving_processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, backend="pil")


@needs_vllm
def test_64_users_at_once_get_their_own_right_answers(served, wanted):
    _, address, _ = served
    users = [(number, question) for question in wanted for number in range(32)]
    slowest = []

    async def one(client, number, question):
        picture = {"url": "data:;base64," + base64.b64encode(PICTURES[number].read_bytes()).decode()}
        content = {"data": [picture, question, True, 0, 1, 60]}
        event = (await client.post("/gradio_api/call/answer", json=content)).json()["event_id"]
        async with client.stream("GET", f"/gradio_api/call/answer/{event}") as stream:
            lines = [line async for line in stream.aiter_lines()]
        assert "event: complete" in lines
        return [json.loads(line[6:])[0] for line in lines if line.startswith("data: [")]

    async def look(client, answering):
        while not answering.done():
            began = time.monotonic()
            (await client.get("/config")).raise_for_status()
            slowest.append(time.monotonic() - began)
            await asyncio.sleep(0.1)

    async def all_at_once():
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=200)) as client:
            began, answering = time.monotonic(), asyncio.gather(*(one(client, *user) for user in users))
            await look(client, answering)
            return await answering, time.monotonic() - began

    answers, seconds = asyncio.run(all_at_once())
    assert [states[-1] for states in answers] == [wanted[question][number] for number, question in users]
    assert any(len(set(states)) > 2 for states in answers)  # they stream
    assert len(slowest) >= 3 and max(slowest) < seconds / 2, slowest  # the page answers all the while


@pytest.fixture
def page(served, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(served[1])
    expect(page.locator("#send")).to_be_visible()
    yield page
    page.close()
    assert not page.problems


@needs_vllm
def test_the_page_shows_both_models_beside_each_other(page, wanted):
    give(page, PICTURES[16])
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, CAPTION)
    expect(page.locator("#again")).to_be_enabled()
    assert page.locator(".aligned .answer").inner_text() == wanted[CAPTION][16]
    assert page.locator(".base .answer").inner_text().startswith("The image shows ")
    line = page.locator(".aligned .cost").inner_text()
    assert re.search(r"s to first token · [\d.]+ tokens/s · .*miniature-BF16", line), line
    assert "miniature-FP8-Dynamic" in page.locator(".base .cost").inner_text()
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/host_quantized.png")
    ask(page, "Is there a cup in this image?")  # a follow-up, which sees the conversation
    expect(page.locator(".aligned .answer")).to_have_count(2)
    expect(page.locator("#again")).to_be_enabled()
    page.locator("#clear").click()
    expect(page.locator(".aligned .answer")).to_have_count(0)
    give(page, ("notes.png", "image/png", b"no picture"))
    expect(page.locator("#notices")).to_contain_text("no picture that can be read")


@needs_vllm
def test_an_engine_that_dies_is_said_and_ends_the_process(served, page):
    """The last test that uses the page: there is no page after it."""
    process, _, log = served
    give(page, PICTURES[0])
    expect(page.locator("#picture img")).to_be_visible()
    engines = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "EngineCor"], capture_output=True, text=True)
    for pid in engines.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    ask(page, CAPTION)
    expect(page.locator("#notices")).to_contain_text("engine has died")
    assert process.wait(30) == 1
    assert log.read_text().count("error: the model's engine has died") == 1


# ---------------------------------------------------------------------------- without vLLM


class Stub(BaseHTTPRequestHandler):
    """A server that does as its `mode` says, and keeps what it was asked."""

    mode, asked, sent = "good", [], 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "models/llava", "object": "model", "max_model_len": 100}], "object": "list"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer secret":
            return self.reply({"error": {"message": "no key"}}, 401)
        if self.path == "/tokenize":
            return self.reply({"token_strs": ["<s>", "[INST]"] if self.mode == "bos" else ["[INST]", "Is"]})
        self.asked.append(body)
        if self.mode == "refusing":
            return self.reply({"error": {"message": "too long for me"}}, 400)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = ["A", " red", " cup"] if self.mode != "endless" else ["A"] * 500
        for number, word in enumerate(words):
            if self.mode == "garbage":
                self.wfile.write(b"data: {no json\n\n")
                return
            choice = {"index": 0, "delta": {"content": word}, "token_ids": [number],
                      "finish_reason": ("stop", "abort")[self.mode == "aborting"] if number == len(words) - 1 else None}  # fmt: skip
            if self.mode == "plain":
                del choice["token_ids"]
            self.wfile.write(
                f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n".encode()
            )
            if self.mode == "breaking":
                return
            if self.mode == "endless":
                Stub.sent = number
                time.sleep(0.05)
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def stub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Stub.asked.clear()
    Stub.mode = "good"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield f"http://127.0.0.1:{server.server_port}/v1/"
    server.shutdown()


def collect(server, question="What is this?", earlier=(), **sampling):
    async def run():
        prompt = server.write_prompt(serving.ShownPicture(load_image(PICTURES[0]), 0), question, list(earlier))
        sampling_ = {"temperature": 0, "top_p": 1, "max_new_tokens": 1000} | sampling
        return [(list(tokens), text) async for tokens, text, _ in server.stream(prompt, **sampling_)]

    with ThreadPoolExecutor(1) as pool:  # Playwright's loop runs in this thread
        return pool.submit(asyncio.run, run()).result()


def test_a_server_is_asked_as_the_model_was_trained(stub):
    states = collect(serving.Server(stub), "Is <image> a </s>?", temperature=0.5, top_p=0.25)
    assert states == [([0], "A"), ([0, 1], "A red"), ([0, 1, 2], "A red cup")]
    asked = Stub.asked[-1]
    assert asked["add_special_tokens"] is True and asked["max_completion_tokens"] == 100 and asked["temperature"] == 0.5
    assert asked["top_p"] == 0.25
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "text"]
    assert asked["messages"][0]["content"][1]["text"] == "Is (image) a (/s)?"
    data = asked["messages"][0]["content"][0]["image_url"]["url"]
    assert load_image(base64.b64decode(data.split(",")[1])).tobytes() == load_image(PICTURES[0]).tobytes()
    Stub.mode = "bos"
    collect(serving.Server(stub), "And?", [("What is it?", serving.Answer("A cup."))])
    assert Stub.asked[-1]["add_special_tokens"] is False
    messages = Stub.asked[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for message in messages[::2] for part in message["content"]] == ["image_url", "text", "text"]
    assert messages[1]["content"] == "A cup." and messages[2]["content"][0]["text"] == "And?"
    Stub.mode = "plain"  # an older vLLM
    assert collect(serving.Server(stub))[-1] == ([], "A red cup")


def test_what_goes_wrong_at_a_server_is_one_sentence(stub, capsys, monkeypatch):
    server = serving.Server(stub)
    for mode, words in (("refusing", "refuses this: .*too long for me"), ("breaking", "broke off in the middle"),
                        ("aborting", "broke off in the middle"), ("garbage", "does not answer")):  # fmt: skip
        Stub.mode = mode
        with pytest.raises(serving.Refused, match=words) as refused:
            collect(server)
        assert server.url not in str(refused.value)
    monkeypatch.setattr(Stub, "do_GET", lambda self: self.reply("<html>"))
    for address in (f"http://127.0.0.1:{free_port()}", stub):  # nobody, and somebody else
        with pytest.raises(SystemExit) as error:
            serving.Server(address)
        assert error.value.code == 2 and "start it first, or correct the address" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(SystemExit) as error:
        serving.Server(stub)
    assert error.value.code == 2 and "refuses the key in OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SystemExit) as error:
        serving.Server(stub)
    assert error.value.code == 2 and "wants a key" in capsys.readouterr().err


def test_users_wait_in_order_too_many_are_refused_and_stop_stops(stub):
    Stub.mode = "endless"
    host = serving.VllmHost(serving.parse_args(["--server_url", stub, "--max_num_seqs", "1", "--queue_size", "1"]))
    data = PICTURES[0].read_bytes()

    async def ask_one(session, states):
        picture, question = host.prepare(data, CAPTION)
        prompts = host.write_prompts(picture, question, {True: []})
        async for answers in host.answer(picture, prompts, session, True, temperature=0, top_p=1, max_new_tokens=99):
            states.append(answers[True])

    async def until(condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.02)

    async def run():
        first, second = [], []
        one = asyncio.create_task(ask_one("one", first))
        await until(lambda: first and first[-1].tokens)
        two = asyncio.create_task(ask_one("two", second))
        await until(lambda: second and "waiting for a place, 0 before this one" in second[-1].line)
        burst = await asyncio.gather(*(ask_one(str(number), []) for number in range(5)), return_exceptions=True)
        assert all(isinstance(error, serving.Refused) for error in burst)  # at once too
        with pytest.raises(serving.Refused, match="queue is full: 1 answers wait"):
            await ask_one("three", [])
        host.stop_session("one")
        await one
        assert first[-1].line.endswith("stopped") and not first[-1].objects  # nothing is checked after Stop
        await until(lambda: second[-1].tokens)  # its place went to who waited
        two.cancel()  # who leaves, stops
        sent = Stub.sent
        await asyncio.sleep(0.5)
        assert Stub.sent <= sent + 4 and not host.running and not host.waiting
        await asyncio.wait_for(host.places.acquire(), 30)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, run()).result()


@pytest.mark.parametrize(("flags", "words"), [
    (["--model_path", "nowhere"], "is no folder; make a checkpoint with llava_quantize_vllm.py"),
    (["--model_path", str(MINIATURE)], "has no config.json"),
    (["--server_url", "gpu1:8000"], "is no address"),
    (["--server_url", "http://a", "http://b", "http://c"], "two models at most"),
    (["--max_tokens", "0"], "--max_tokens is 0; it must be above 0"), (["--tensor_parallel_size", "0"], "above 0"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        serving.main(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_seeds_flags_work_as_written():
    args = serving.parse_args("--model_path /workspace/q --tensor_parallel_size 2 --max_num_seqs 8 --temperature 0.2 "
                              "--max_tokens 300".split())  # fmt: skip
    assert (args.model_path, args.tensor_parallel_size, args.max_num_seqs) == ("/workspace/q", 2, 8)
    assert (args.temperature, args.max_new_tokens) == (0.2, 300)


def test_help_lists_every_flag():
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    flags = {"model_path", "server_url", "tensor_parallel_size", "test_mode", "dtype", "max_tokens", "temperature", "max_num_seqs",
             "queue_size", "host", "port", "share", "auth_file"}  # fmt: skip
    assert flags <= set(re.findall(r"--(\w+)", text))
