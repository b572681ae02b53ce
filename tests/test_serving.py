"""The page over vLLM: the prompt and the adapters are proved, answers are transformers' for many users at once, and nothing
is left when the page ends or is killed. vLLM runs in an environment of its own, .venv-vllm."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import jinja2
import psutil
import pytest
import torch
from conftest import MINIATURE, ROOT
from gradio_client import Client, handle_file
from test_host import PICTURES, QUESTIONS, ask_at_once, free_port, wait_until
from test_host_page import (  # noqa: F401  (the tests of the page, which run here on this page)
    CAPTION,
    browser,
    open_page,
    test_bad_input_gets_a_sentence_and_the_page_goes_on,
    test_on_a_phone_the_answers_are_in_sight,
    test_stop_a_new_picture_and_leaving_end_the_generation,
    test_two_answers_stream_and_what_differs_is_marked,
)
from transformers import AutoProcessor

import llava_gradio_lora_host_quantized as serving
from llava_gradio_lora_host import build_chat
from llava_orpo_training import build_prompt, generate_answers, load_image, load_llava

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
PROCESSOR = AutoProcessor.from_pretrained(MINIATURE / "model", backend="pil")
BASE = ["--model_path", MINIATURE / "model"]
ADAPTER = ["--lora_path", MINIATURE / "adapter"]


@pytest.fixture(scope="session")
def vllm():
    if not PYTHON.exists() and "CI" not in os.environ:
        pytest.skip("no .venv-vllm here: make test makes it")


def needs_vllm(test):
    return pytest.mark.slow(pytest.mark.usefixtures("vllm")(test))


@contextmanager
def running_page(folder, *flags):
    """The page in .venv-vllm, once it is there: (process, address)."""
    port, log = free_port(), folder / "page.log"
    command = [PYTHON, "llava_gradio_lora_host_quantized.py", *flags, *ADAPTER, "--port", port]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=ENVIRONMENT, cwd=ROOT)
    try:
        wait_until(lambda: "The page is at" in log.read_text() or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()[-3000:]
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def find_child(process):
    """The process group and the socket of the page's own vLLM."""
    found = psutil.Process(process.pid).children()
    (child,) = [child for child in found if "--served-model-name" in child.cmdline()]
    command = child.cmdline()
    return child.pid, Path(command[command.index("--uds") + 1])


def members(group):
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="session")
def served(vllm, tmp_path_factory):
    """The page over base and adapter, in float32: (process, address)."""
    with running_page(tmp_path_factory.mktemp("page"), *BASE, "--dtype", "float32") as page:
        yield page


@pytest.fixture(scope="session")
def wanted():
    """What transformers answers: {(picture, question, model): answer}."""
    model, processor = load_llava(str(BASE[1]), str(ADAPTER[1]), "cpu")
    images, found = [load_image(picture) for picture in PICTURES[:24]], {}
    for question, name in product((CAPTION, QUESTIONS[2]), ("model", "adapter")):
        with nullcontext() if name == "adapter" else model.disable_adapter():
            answers = generate_answers(model, processor, images, [question] * 24, 60)
        found |= {(picture, question, name): answer for picture, answer in zip(PICTURES, answers, strict=False)}
    return found


# ---------------------------------------------------------------------------- with vLLM


@needs_vllm
def test_users_at_once_get_transformers_answers_of_base_and_adapter(served, wanted):
    """Base and adapter in one batch too, which vLLM mixes up on a CPU if every place for adapters is taken."""
    assert ask_at_once(served[1], list(wanted), 60) == list(wanted.values())
    assert any(wanted[picture, CAPTION, "model"] != wanted[picture, CAPTION, "adapter"] for picture in PICTURES[:24])


@needs_vllm
def test_special_tokens_are_words_and_what_is_too_long_is_refused(served):
    client, picture = Client(served[1], verbose=False), handle_file(str(PICTURES[0]))
    assert client.predict(picture, "<image> </s> Is it?", api_name="/answer")
    assert client.predict(picture, CAPTION, "model", 0, 1, 5000, api_name="/answer")  # more than the model's context
    with pytest.raises(Exception, match="maximum context length"):
        client.predict(picture, "cup " * 999, api_name="/answer")


@pytest.fixture(scope="module")
def site(served, wanted):
    """The page in this process, over the vLLM that the other page has started."""
    socket = find_child(served[0])[1]
    engine = serving.ServedModels([f"unix:{socket}"])
    page = serving.build_page(engine, "<mark>Marked</mark> words are not in the other answer.", 900, False, 8)
    serving.launch_page(page)

    def growing():
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
            text = client.get("http://vllm/metrics").text
        return sum(float(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)", text, re.M))

    found = SimpleNamespace(name="host_quantized", address=page.local_url, engine=engine, growing=growing)
    found.answers = {model: wanted[PICTURES[16], CAPTION, model] for model in engine.models}
    yield found
    page.close()


@pytest.fixture
def endless(site, monkeypatch):
    """No token ends an answer, so that it grows until it is stopped or long enough."""
    served = {name: (*rest, extra | {"ignore_eos": True}) for name, (*rest, extra) in site.engine.served.items()}
    monkeypatch.setattr(site.engine, "served", served)


@needs_vllm
def test_no_other_user_reaches_the_pages_own_vllm(served):
    """It listens on no port: vLLM asks for a key only below /v1, and answers /invocations without one."""
    group, path = find_child(served[0])
    assert path.parent.stat().st_mode & 0o077 == 0
    assert not {"--port", "--host"} & {*psutil.Process(group).cmdline()}
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://vllm/v1/models").status_code == 200  # for this user
    if os.geteuid() == 0:
        program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        command = ["/usr/bin/python3", "-c", program, str(path)]
        refused = subprocess.run(command, user=65534, group=65534, capture_output=True, text=True, cwd="/")
        assert refused.returncode and "PermissionError" in refused.stderr, refused.stderr


@needs_vllm
def test_every_request_has_the_trained_prompt(served):
    models = serving.ServedModels([f"unix:{find_child(served[0])[1]}"])
    assert models.models == ["model", "adapter"]
    for _, _, longest, extra in models.served.values():
        assert longest == 1024 and extra == {}
    image = load_image(PICTURES[3])
    questions = (CAPTION, "Is there\n a chair, please?", "日本語 🎉")
    talks = [[(question, None)] for question in questions]
    talks += [[(CAPTION, "The image shows a tree."), (question, None)] for question in questions]

    async def ask_all():
        fields = {"model": "model", "max_completion_tokens": 1, "extra_body": {"return_token_ids": True}}
        create = models.served["model"][0].chat.completions.create
        return [await create(messages=serving.write_messages(image, turns), **fields) for turns in talks]

    replies = run(ask_all())
    for reply, turns in zip(replies, talks, strict=True):
        assert reply.prompt_token_ids == build_chat(PROCESSOR, image.size, turns)


@needs_vllm
def test_a_killed_page_leaves_no_process(served):
    """The last test that uses the page."""
    group, path = find_child(served[0])
    assert len(members(group)) > 3
    served[0].kill()
    wait_until(lambda: not members(group) and not path.parent.exists())


@needs_vllm
def test_an_adapter_on_an_fp8_base_answers_as_in_transformers(tmp_path):
    import llava_quantize_vllm as quantizing

    folder, pictures = tmp_path / "fp8", PICTURES[:32]
    flags = [*BASE, "--scheme", "FP8_DYNAMIC", "--output_dir", folder, "--gate_samples", "0"]
    quantizing.main(list(map(str, flags)))
    model, processor = load_llava(str(folder), str(ADAPTER[1]), "cpu")
    wanted = generate_answers(model, processor, list(map(load_image, pictures)), [CAPTION] * 32, 60)
    with running_page(tmp_path, "--model_path", folder) as (_, address):
        answers = ask_at_once(address, [(picture, CAPTION, "adapter") for picture in pictures], 60)
    same = sum(answer == right for answer, right in zip(answers, wanted, strict=True))
    print(f"{same} of 32 answers the same")
    assert same >= 28


@needs_vllm
def test_vllm_answers_as_transformers_in_every_scheme(made, tmp_path):
    """FP8_BLOCK is not among them: vLLM has no kernel for it on a CPU."""
    exact = tmp_path / "float32"
    exact.symlink_to(made["BF16"])
    folders = {"float32": exact} | {scheme: made[scheme] for scheme in ("FP8_DYNAMIC", "W8A8", "W4A16")}
    pictures = json.dumps([str(path) for path in PICTURES[:20]])
    command = [PYTHON, ROOT / "tests" / "run_vllm.py", pictures, tmp_path / "answers.json", *folders.values()]
    subprocess.run([*map(str, command)], check=True, timeout=500, env=ENVIRONMENT)
    answers = json.loads((tmp_path / "answers.json").read_text())
    images = [load_image(picture) for picture in PICTURES[:20]]
    for scheme, folder in folders.items():
        model, processor = load_llava(str(folder))
        assert len(answers[str(folder)]) == 20
        gaps = []
        for image, answer in zip(images, answers[str(folder)], strict=True):
            prompt = build_prompt(processor, CAPTION, image.size)
            pixels = processor.image_processor(image, return_tensors="pt").to(model.dtype)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer["tokens"]]), **pixels).logits[0]
            scores = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            scores = scores.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
            gaps.append((scores - torch.tensor(answer["logprobs"])).abs())
        texts = generate_answers(model, processor, images, [CAPTION] * 20, 60)
        same = sum(a == b["text"] for a, b in zip(texts, answers[str(folder)], strict=True))
        gap = torch.cat(gaps).mean().item()
        print(f"{scheme}: {same} of 20 captions the same, log-probabilities {gap:.5f} apart")
        assert (same == 20 and gap < 1e-4) if scheme == "float32" else (same >= 14 and gap < 0.05), (scheme, same, gap)


@needs_vllm
def test_ambers_script_runs_on_the_quantized_checkpoint(made, tmp_path):
    script = "llava_amber_validation_benchmark_with_lora.py"
    flags = "--test_mode --evaluation_type g --limit 20 --nouns vocabulary --output_file".split()
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    quantized = ["--backend", "vllm", "--model_path", made["FP8_DYNAMIC"]]
    for python, name, model in ((PYTHON, "vllm", quantized), (sys.executable, "plain", ADAPTER)):
        command = [python, script, *flags, tmp_path / name / "results.json", *model]
        subprocess.run([*map(str, command)], check=True, timeout=300, cwd=ROOT, env=environment)
    answers = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("vllm", "plain")]
    assert len(answers[0]) == 20 and sum(a == b for a, b in zip(*answers, strict=True)) >= 14
    scores = [json.loads((tmp_path / folder / "scores.json").read_text()) for folder in ("vllm", "plain")]
    vllm, transformers = (score["strict"]["generative"]["cover"] for score in scores)
    assert abs(vllm - transformers) < 6


@needs_vllm
def test_vllm_knows_our_flags_and_the_readmes():
    """As its own parser reads them: the command with which `vllm serve` is started on a GPU, and the README's."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ").replace("…", "folder")
    lines = [line for line in re.findall(r"vllm serve ([^`\n]+)", text) if "--" in line]
    program = """if 1:
        import importlib.metadata, shlex, sys
        import llava_gradio_lora_host_quantized as serving
        flags, real = {"dtype": "auto", "tensor-parallel-size": 2, "max-num-seqs": 8, "uds": "/a/b"}, importlib.metadata.version
        importlib.metadata.version = lambda name: "0.32.0"  # as if this were not the build for the CPU
        command, _ = serving.write_command("miniature/model", ["miniature/adapter"], flags)
        importlib.metadata.version = real
        assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(command[4:])
        print(args.model_tag, args.tensor_parallel_size, args.max_lora_rank, args.lora_modules)
        for line in sys.argv[1:]:
            print(parser.parse_args(shlex.split(line)))"""
    command = [str(PYTHON), "-c", program, *lines]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "miniature/model 2 16 [LoRAModulePath(name='adapter', path='miniature/adapter'" in run.stdout


# ---------------------------------------------------------------------------- without vLLM


class Stub(BaseHTTPRequestHandler):
    """A server that does as its `mode` says: bos, bare (no BOS), adds (add_special_tokens adds it), vicuna; and breaking …"""

    mode, asked, adapter_moves = "bos", [], 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = [{"id": "models/llava", "max_model_len": 100}, {"id": "orpo", "parent": "models/llava"}]
        if self.headers["Authorization"] == "Bearer secret":
            return self.reply({"data": models, "object": "list"})
        self.reply({"error": {"message": "no key"}}, 401)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.reply({"tokens": self.tokenize(**body)})
        self.asked.append(body)
        if "prompt_logprobs" in body:
            score = {"5": {"logprob": -1.0 - self.adapter_moves * (body["model"] == "orpo")}}
            choice = {"index": 0, "message": {"role": "assistant", "content": "A"}}
            return self.reply({"choices": [choice], "prompt_logprobs": [None, score]})
        if self.mode == "refusing":
            return self.reply({"error": {"message": "too long for me"}}, 400)
        words = [("A", None), (" red", None), (" cup", "abort" if self.mode == "aborting" else "stop")]
        choices = [{"index": 0, "delta": {"content": word}, "finish_reason": end} for word, end in words]
        events = [json.dumps({"id": "1", "choices": [choice]}) for choice in choices] + ["[DONE]"]
        events = {"garbage": ["{no json"], "breaking": events[:1]}.get(self.mode, events)
        self.reply("".join(f"data: {event}\n\n" for event in events))

    def tokenize(self, prompt=None, messages=(), add_special_tokens=False, **_):
        for part in [part for message in messages for part in message["content"]]:
            part["type"] = part["type"].removesuffix("_url")
        template = serving.CHAT_TEMPLATE.removeprefix("" if self.mode == "bos" else "{{ bos_token }} ")
        template = template.replace("[INST]", "USER:") if self.mode == "vicuna" else template
        text = prompt or jinja2.Template(template).render(messages=messages, bos_token="<s>", eos_token="</s>")
        ids, image = PROCESSOR.tokenizer(text, add_special_tokens=False).input_ids, PROCESSOR.image_token_id
        ids = [1] * (self.mode == "adds" and add_special_tokens) + ids
        return [i for token in ids for i in [token] * (7 if token == image and messages else 1)]

    def reply(self, content, status=200):
        stream = isinstance(content, str)
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.end_headers()
        self.wfile.write((content if stream else json.dumps(content)).encode())


@pytest.fixture
def stub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Stub.asked.clear()
    monkeypatch.setattr(Stub, "mode", "bos")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    yield f"http://127.0.0.1:{server.server_port}/v1/"
    server.shutdown()


def run(coroutine):
    with ThreadPoolExecutor(1) as pool:  # Playwright's loop runs in this thread
        return pool.submit(asyncio.run, coroutine).result()


def collect(models, name="llava", turns=(("What is this?", None),), *sampling):
    async def stream():
        return [answers[name] async for answers in models.stream(load_image(PICTURES[0]), {name: turns}, *sampling)]

    return run(stream())


def test_a_server_is_asked_as_the_model_was_trained(stub, monkeypatch):
    models = serving.ServedModels([stub])
    assert models.models == ["llava", "orpo"]
    turns = [("Is <image> a </s>?", "A cup."), ("And?", None)]
    assert collect(models, "orpo", turns, 0.5, 0.25, 1000)[-1] == "A red cup"
    asked = Stub.asked[-1]
    assert (asked["model"], asked["temperature"], asked["top_p"]) == ("orpo", 0.5, 0.25)
    assert asked["max_completion_tokens"] == 100  # its base's context
    assert [message["role"] for message in asked["messages"]] == ["user", "assistant", "user"]
    picture, question = asked["messages"][0]["content"]
    assert question["text"] == "Is (image) a (/s)?" and asked["messages"][2]["content"][0]["text"] == "And?"
    data = serving.base64.b64decode(picture["image_url"]["url"].split(",")[1])
    assert load_image(data).tobytes() == load_image(PICTURES[0]).tobytes()
    monkeypatch.setattr(Stub, "mode", "adds")
    collect(serving.ServedModels([stub]))
    assert Stub.asked[-1]["add_special_tokens"] is True and Stub.asked[-1]["max_completion_tokens"] == 100
    two = serving.ServedModels([stub, stub.replace("127.0.0.1", "localhost")])
    assert len({*two.models}) == 4 and two.models[0].startswith("models/llava at 127.0.0.1:")


def test_what_cannot_be_proved_is_refused_before_the_page(stub, capsys, monkeypatch):
    def refused(url=stub):
        with pytest.raises(SystemExit) as error:
            serving.ServedModels([url])
        assert error.value.code == 2
        return capsys.readouterr().err

    for mode, words in (("bare", "--chat-template"), ("vicuna", "--scheme BF16")):
        monkeypatch.setattr(Stub, "mode", mode)
        assert words in (sentence := refused())
        assert serving.shlex.split(sentence.rstrip(".\n"))[-1] == serving.CHAT_TEMPLATE
    monkeypatch.setattr(Stub, "mode", "bos")
    monkeypatch.setattr(Stub, "adapter_moves", 0)
    assert "does not apply the adapter orpo" in refused()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert "another key" in refused() and "start it first" in refused("http://127.0.0.1:9")


def test_what_goes_wrong_at_a_server_is_one_sentence(stub, monkeypatch):
    models, broken = serving.ServedModels([stub]), "broke off in the middle"
    sentences = {"refusing": "refuses this question: .*too long for me", "garbage": "does not answer"}
    for mode, words in (sentences | {"breaking": broken, "aborting": broken}).items():
        monkeypatch.setattr(Stub, "mode", mode)
        with pytest.raises(gr.Error, match=words) as refused:
            collect(models)
        assert "127.0.0.1" not in str(refused.value)


def save_adapter(folder, keys, rank=4):
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
    save_file({f"base_model.model.{key}": torch.zeros(rank, 3) for key in keys}, folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_that_vllm_would_apply_in_part_is_refused(tmp_path, capsys):
    good = "model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    assert serving.read_rank(str(MINIATURE / "adapter"))[1] == 16
    assert serving.read_rank(save_adapter(tmp_path / "good", [good], 40))[1] == 40  # a pattern's rank counts
    for number, (rank, *keys) in enumerate((
        (4, good, "model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight"),
        (4, good, "model.multi_modal_projector.linear_1.lora_A.weight"),
        (4, good, good.replace("lora_A", "lora_magnitude_vector")),
        (4, "model.layers.0.mlp.up_proj.lora_A.weight"),  # LLaVA's own names, which vLLM does not find
        (600, good),
    )):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            serving.read_rank(save_adapter(tmp_path / str(number), keys, rank))
        assert error.value.code == 2 and "merge the adapter with llava_quantize_vllm.py" in capsys.readouterr().err


def test_the_watchdog_ends_a_server_that_does_not_listen(tmp_path):
    """One that ignores SIGTERM is killed, and its own children with it."""
    program = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); subprocess.Popen(['sleep', '99']); time.sleep(99)"
    fast = serving.WATCHDOG.replace("sleep 10", "sleep 1")
    command = ["sh", "-c", fast, tmp_path / "socket", sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    wait_until(lambda: len(members(process.pid)) == 5)  # two shells, cat, the server and its child
    process.stdin.close()
    assert process.wait(30) == -signal.SIGKILL
    wait_until(lambda: not members(process.pid))


BAD_FLAGS = {
    "--model_path no/where": "neither a folder nor a hub id",
    f"--model_path {MINIATURE}": "config.json",
    f"--model_path {BASE[1]} --lora_path {BASE[1]}": "adapter_config.json",
    "--server_url gpu1:8000": "is not an address",
    "--server_url http://a --lora_path b": "--model_path",
    "--max_tokens 0": "0 is not from 1",
    "--temperature 3": "from 0 to 2",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_sentence(flags, capsys, monkeypatch):
    with pytest.raises(SystemExit) as error:
        serving.main(flags.split())
    assert error.value.code == 2 and BAD_FLAGS[flags] in capsys.readouterr().err


def test_the_pages_temperature_starts_where_the_flag_says():
    args = serving.parse_args(["--temperature", "0.2", "--max_tokens", "300"])
    engine = SimpleNamespace(models=["a"])
    page = serving.build_page(engine, "", args.max_tokens, True, 1, None, args.temperature)
    assert [block.value for block in page.blocks.values() if "Temperature" in str(getattr(block, "label", ""))] == [0.2]
