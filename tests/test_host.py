"""The LoRA host without a browser: its answers are plain generation's for every user, and bad input gets one sentence."""

import asyncio
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from conftest import MINIATURE, ROOT
from gradio_client import Client, handle_file
from PIL import Image

import llava_gradio_lora_host as host
from llava_orpo_training import generate_answers

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "llava_gradio_lora_host.py"
PICTURES = sorted((MINIATURE / "amber" / "image").glob("*.webp"))
QUESTIONS = ["Describe this image.", "Name everything you can see in this image.", "Is there a cup in this image?"]


@pytest.fixture(scope="session")
def engine():
    return host.Engine(*host.load_llava(str(MINIATURE / "model"), str(MINIATURE / "adapter"), "cpu"), 16)


@pytest.fixture
def endless(engine, monkeypatch):
    """No token ends an answer, so that it grows until it is stopped or long enough; slowly, as on a busy machine the browser
    shows it late."""
    monkeypatch.setattr(engine, "ends", {-1})
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", 10**6)
    hook = engine.model.get_base_model().lm_head.register_forward_hook(lambda *_: time.sleep(0.02))
    yield engine
    hook.remove()


@pytest.fixture(scope="module")
def address(engine):
    """The page over the `engine`, listening."""
    page = host.build_page(engine, "", 1024, False, 64)
    host.launch_page(page)
    yield page.local_url.rstrip("/")
    page.close()


def plain(engine, picture, question, model="Adapter", max_new_tokens=100):
    """What generate_answers says."""
    image = host.load_image(picture)
    with host.nullcontext() if model == "Adapter" else engine.model.disable_adapter():
        return generate_answers(engine.model, engine.processor, [image], [question], max_new_tokens)[0]


async def grow(engine, picture, question, model, *sampling):
    """All that is shown of an answer while it grows."""
    stream = engine.stream(host.load_image(picture), {model: [(question, None)]}, *sampling)
    return [answers[model] async for answers in stream]


def finish(engine, *asked):
    """The answers to questions that are asked at once, each as (picture, question, model, ...)."""

    async def everyone():
        return await asyncio.gather(*[grow(engine, *each) for each in asked])

    return [parts[-1] for parts in asyncio.run(everyone())]


def note_batches(engine, monkeypatch, users):
    """The batches that the engine generates. The first one waits until all users have asked."""
    batches, generate = [], engine.generate

    def note(batch):
        wait_until(lambda: batches or len(engine.jobs) == users)
        batches.append(batch)
        generate(batch)

    monkeypatch.setattr(engine, "generate", note)
    return batches


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------- the engine


def ask_at_once(address, asked, max_new_tokens=100):
    """The answers to 32 users at a time over four connections. Each asks about (picture, question, model)."""
    clients = [Client(address, verbose=False, httpx_kwargs={"timeout": 120}) for _ in range(4)]

    def user(number):
        picture, *rest = asked[number]
        file, ask = handle_file(str(picture)), clients[number % 4].predict
        return ask(file, *rest, 0, 1, max_new_tokens, api_name="/answer")

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(user, range(len(asked))))


def test_32_users_at_once_get_their_own_right_answers(engine, address, monkeypatch):
    asked = [(PICTURES[n], QUESTIONS[n % 3], engine.models[n // 3 % 2]) for n in range(32)]
    batches = note_batches(engine, monkeypatch, 32)
    assert ask_at_once(address, asked) == [plain(engine, *each) for each in asked]
    assert max(map(len, batches)) == 16 and any(len({job.adapter for job in batch}) == 2 for batch in batches)


def test_the_api_streams(engine, address):
    job = Client(address, verbose=False).submit(handle_file(str(PICTURES[0])), api_name="/answer")
    assert job.result(timeout=60) == plain(engine, PICTURES[0], QUESTIONS[0])
    parts = job.outputs()
    assert len(parts) > 2 and all(whole.startswith(part) for part, whole in zip(parts, parts[1:], strict=False))


def test_an_adapter_of_the_projector_is_never_mixed_with_the_base(engine, monkeypatch):
    with monkeypatch.context() as patched:
        added = "base_model.model.model.multi_modal_projector.linear_1.lora_A.default.weight"
        patched.setattr(engine.model, "named_parameters", lambda: [(added, None)])
        monkeypatch.setattr(engine, "mixes", host.Engine(engine.model, engine.processor, 1).mixes)
    asked, batches = (
        [(PICTURES[16], QUESTIONS[0], name) for name in engine.models],
        note_batches(engine, monkeypatch, 2),
    )
    assert finish(engine, *asked) == [plain(engine, *each) for each in asked]
    assert all(len({job.adapter for job in batch}) == 1 for batch in batches)


def test_a_conversation_is_one_prompt_and_a_question_is_plain_text(engine, photo_llava):
    size = (112, 112)
    start = host.build_prompt(engine.processor, "Is there a ball?", size)
    ids = host.build_chat(engine.processor, size, [("Is there a ball?", "Yes"), ("And a cup?", None)])
    assert ids[: len(start)] == start
    encode = host.partial(engine.processor.tokenizer, add_special_tokens=False)
    assert ids[len(start) :] == [*encode("Yes").input_ids, 2, *encode("[INST] And a cup? [/INST]").input_ids]
    for processor in (engine.processor, host.read_checkpoint(str(photo_llava))[1]):
        specials = {processor.image_token_id, *processor.tokenizer.all_special_ids} - {processor.tokenizer.unk_token_id}
        for turns in ([("{}", None)], [("{}", "{}"), ("Is it?", None)]):
            hostile, normal = (
                host.build_chat(processor, size, [[part and part.format(text) for part in turn] for turn in turns])
                for text in ("<image> </s> <s> <pad>", "Is it?")
            )
            assert all(hostile.count(special) == normal.count(special) for special in specials)


def test_who_stops_reading_ends_the_generation_and_nobody_elses(endless):
    async def leave():
        asked = [(PICTURES[1], "Adapter", 150), (PICTURES[0], "Base", 900), (PICTURES[2], "Base", 900)]
        asking = [grow(endless, picture, QUESTIONS[0], model, 0, 1, length) for picture, model, length in asked]
        other, mine = (asyncio.create_task(each) for each in asking[:2])
        while not (jobs := [job for job in endless.jobs if job.tokens and not job.adapter]):
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(asking[2])
        await asyncio.sleep(0.05)
        mine.cancel()
        waiting.cancel()  # before its turn
        return jobs[0], await other

    job, parts = asyncio.run(leave())
    wait_until(lambda: not endless.jobs)
    assert 0 < len(job.tokens) < 300
    length = len(endless.processor.tokenizer(parts[-1], add_special_tokens=False).input_ids)
    assert len(parts) > 3 and 100 < length <= 150  # as long as asked


def test_sampling_follows_its_settings(engine):
    asked = (PICTURES[6], QUESTIONS[1], "Base")

    def draw(*sampling):
        return set(finish(engine, *[(*asked, *sampling, 40)] * 6))

    assert draw(0, 1) == {plain(engine, *asked, 40)} == draw(1, 0.01)
    assert len(draw(1.5, 1)) > 1


def test_a_failure_costs_one_batch_and_not_the_page(engine, monkeypatch):
    asked = (PICTURES[0], QUESTIONS[0], "Base")
    with monkeypatch.context() as patched:
        patched.setattr(engine, "generate", lambda batch: 1 / 0)
        with pytest.raises(gr.Error, match="failed on this question"):
            finish(engine, asked)
    assert finish(engine, asked) == [plain(engine, *asked)]
    with pytest.raises(gr.Error, match="longer than the model can read"):
        finish(engine, (PICTURES[0], "cup " * 5000, "Base"))


# ---------------------------------------------------------------------------- pictures, questions, words


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def header(width, height):
    """A BMP that says it has this size, and has no pixels."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


RED = Image.new("RGB", (60, 40), (200, 10, 10))
REFUSED = {
    "empty": (b"", "no picture"),
    "text": (b"I am no picture", "no picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "no picture"),
    "html": (b"<html><script>alert(1)</script></html>", "no picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture"),
    "100 megapixels": (header(10_000, 10_000), "10,000 x 10,000"),
    "bomb": (header(60_000, 60_000), "far too large"),
    "cut off": (encode(Image.effect_noise((400, 400), 50), "JPEG")[:5000], "damaged"),
    "no pixels": (header(80, 80), "damaged"),
    "strip": (encode(Image.new("RGB", (1000, 2))), "narrow strip"),
}


def test_odd_pictures_are_seen_as_they_look(tmp_path):
    def seen(data):
        (tmp_path / "a").write_bytes(data)
        return np.asarray(host.open_picture(tmp_path / "a")).astype(int)

    assert abs(seen(encode(RED.convert("CMYK"), "JPEG", quality=95)).mean((0, 1)) - [200, 10, 10]).max() < 8
    assert set(seen(encode(Image.fromarray(np.full((40, 60), 128 * 257, np.uint16)))).ravel()) == {128}
    floats = Image.fromarray(np.linspace(0, 3, 60 * 40, dtype=np.float32).reshape(40, 60))
    assert seen(encode(floats, "TIFF"))[[0, -1], [0, -1], 0].tolist() == [0, 255]
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 30, 40))
    assert seen(encode(clear))[0, [0, 59]].tolist() == [[0, 0, 255], [255, 255, 255]]  # transparent on white
    frames = encode(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "blue")] * 3)
    assert abs(seen(frames)[0, 0] - [200, 10, 10]).max() < 8  # the first frame
    exif = RED.getexif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    assert seen(encode(RED, "PNG", exif=exif)).shape == (60, 40, 3)
    assert seen(encode(RED, "MPO", save_all=True, append_images=[RED])).shape == (40, 60, 3)  # a phone's JPEG


def test_only_real_differences_are_marked():
    def marked(text, other, doubtful=frozenset()):
        pieces = host.mark_answers({"a": text, "b": other}, doubtful)["a"]
        assert "".join(piece for piece, _ in pieces) == text
        return "".join(p for p, m in pieces if "differs" in m), [p for p, m in pieces if "doubtful" in m]

    first, second = "A red cup, two cats and a green house.", "Two cats, and a red mug."
    assert marked(first, second) == ("cupgreen house", [])
    assert marked(second, first, {"cats"}) == ("mug", ["cats"])
    assert marked("A cup and a tree.", "A cup, a tree.") == ("", [])  # a comma in place of "and"
    assert marked("A cup and a tree.", "A tree and a cup.") == ("", [])  # the same words elsewhere
    assert marked("A red cup and a red ball.", "A red cup and a blue ball.") == ("red", [])
    assert marked("Yes", "No") == ("Yes", []) and marked("", "No") == ("", [])
    loops = [" ".join(words * 300) for words in (["a", "red", "cup"], ["the", "red", "cup", "and"])]
    started = time.perf_counter()
    marked(*loops)
    assert time.perf_counter() - started < 2  # a long answer that repeats itself


def test_doubtful_objects_are_those_the_base_denies(engine):
    names = {"houses": "house", "tree": "tree", "bucket": "bucket", "cup": "cup", "people": "person", "knives": "knife"}
    answers = {"Base": ", ".join(names).capitalize(), "Adapter": "A word."}
    doubtful = asyncio.run(host.find_doubtful(engine, host.load_image(PICTURES[16]), answers))
    questions = {word: f"Is there a {name} in this image?" for word, name in names.items()}
    denied = {word for word, question in questions.items() if plain(engine, PICTURES[16], question, "Base") != "Yes"}
    assert doubtful == denied and "houses" in denied and "tree" not in denied


def test_answers_and_questions_are_shown_and_never_run():
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> ${alert(3)} & a cat"
    answers = {"A": evil, "B<b>": "no"}
    for marked in ({}, host.mark_answers(answers, {"cat"})):
        shown = host.ANSWERS.render(turns=[{"question": evil, "answers": answers, "marked": marked}])
        assert "<script" not in shown and "<b>" not in shown and "onerror=alert(1)>" not in shown and "cat" in shown


# ---------------------------------------------------------------------------- the API and the server


def upload(address, data, name="a.webp"):
    path = httpx.post(f"{address}/gradio_api/upload", files={"files": (name, data)}).raise_for_status().json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def call(address, *data):
    """The API as curl uses it: the last event and its data."""
    data = [*data, *[None, "Is it?", "Adapter", 0, 1, 60][len(data) :]]
    event = httpx.post(f"{address}/gradio_api/call/answer", json={"data": data}, timeout=60).json()["event_id"]
    lines = httpx.get(f"{address}/gradio_api/call/answer/{event}", timeout=60).text.split("\n")
    events = [line[7:] for line in lines if line.startswith("event: ")]
    return events[-1], json.loads([line[6:] for line in lines if line.startswith("data: ")][-1])


def test_hostile_calls_are_refused_and_the_page_lives_on(engine, address, tmp_path):
    good, gone = (upload(address, picture.read_bytes()) for picture in PICTURES[:2])
    Path(gone["path"]).unlink()
    victim = tmp_path / "victim.webp"
    victim.write_bytes(PICTURES[0].read_bytes())
    cases = [([upload(address, data, f"{name}.png")], words) for name, (data, words) in REFUSED.items()]
    cases += [
        ([upload(address, REFUSED["svg"][0], "a.svg")], "no picture"),
        ([None], "Choose a picture"),
        ([gone], "no longer on the server"),
        ([good, "a" * 20_000], "20,000 characters"),
        ([good, "Is it?", "Adapter", -1], "temperature"),
        ([good, "Is it?", "Adapter", 0, 0], "top_p"),
        ([good, "Is it?", "Nobody"], "Base, Adapter"),
    ]
    others = ("http://127.0.0.1:1/x.png", "http://169.254.169.254/latest/meta-data", "/etc/passwd", SCRIPT, victim)
    others += (f"{good['path']}/../../../{SCRIPT.name}",)
    cases += [([{"path": str(path), "meta": {"_type": "gradio.FileData"}}], "") for path in others]
    for data, words in cases:
        event, content = call(address, *data)
        assert event == "error" and content["error"] and words in content["error"], (data, content)
        assert content["error"].count(". ") == 0 or not words
    assert httpx.get(f"{address}/gradio_api/file={victim}").status_code in (403, 404)
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(21_000_000))}).status_code == 413
    assert call(address, good, "<image> </s> Is it?")[0] == "complete"
    assert call(address, good, QUESTIONS[0]) == ("complete", [plain(engine, PICTURES[0], QUESTIONS[0])])


def test_a_curl_user_who_leaves_costs_nothing_more(endless, address):
    data = [upload(address, PICTURES[0].read_bytes()), QUESTIONS[0], "Adapter", 0, 1, 900]
    event = httpx.post(f"{address}/gradio_api/call/answer", json={"data": data}).json()["event_id"]
    with httpx.stream("GET", f"{address}/gradio_api/call/answer/{event}") as stream:
        next(stream.iter_lines())
        (job,) = endless.jobs
    wait_until(lambda: not endless.jobs)
    assert len(job.tokens) < 500


def test_only_users_of_the_auth_file_come_in_and_no_picture_stays(tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("# who may\nann:pass:word\n\nbob:secret\n")
    port = free_port()
    command = [sys.executable, str(SCRIPT), "--test_mode", "--port", str(port), "--auth_file", str(users)]
    server = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    try:
        assert f"The page is at http://127.0.0.1:{port}" in server.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        assert httpx.post(f"{address}/gradio_api/call/answer", json={"data": []}).status_code == 401
        assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"a")}).status_code == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|credentials"):
            Client(address, auth=("ann", "wrong"), verbose=False)
        client = Client(address, auth=("ann", "pass:word"), verbose=False)
        assert client.predict(handle_file(str(PICTURES[0])), QUESTIONS[2], api_name="/answer") in ("Yes", "No")
        taken = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert taken.returncode == 2 and f"error: --host 127.0.0.1 --port {port} cannot" in taken.stderr
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 143 and not list(tmp_path.glob("llava_host_*"))


@pytest.mark.parametrize("bits", [[], ["--load_4bit"]])
def test_the_terminal_prints_both_answers_side_by_side(engine, capsys, monkeypatch, bits):
    monkeypatch.setenv("COLUMNS", "250")
    pictures = [str(PICTURES[16]), str(PICTURES[6])]
    flags = ["--test_mode", "--device", "cpu", *bits, "--image", *pictures]
    host.main([*flags, "--question", QUESTIONS[0], QUESTIONS[2]])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for picture, question in product(pictures, (QUESTIONS[0], QUESTIONS[2])):
        cells = [cell.strip() for cell in lines[lines.index(f"{picture}: {question}") + 4].strip("│ ").split("│")]
        assert len(cells) == 2 and all(cells)
        assert bits or cells == [plain(engine, picture, question, model) for model in engine.models]


BAD_FLAGS = {
    "--max_new_tokens -1": "-1 is not from 1",
    "--port 99999": "99999",
    "--question why": "--image",
    "--auth_file nowhere.txt": "nowhere.txt cannot be read",
    f"--auth_file {SCRIPT}": "name:password",
    "--model_path nowhere": "--model_path nowhere",
    "--test_mode --lora_path nowhere": "--lora_path nowhere",
    f"--test_mode --device cpu --image {SCRIPT}": "no picture",
    "--load_4bit --load_8bit": "not allowed",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        host.main(flags.split())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in error and BAD_FLAGS[flags] in error
