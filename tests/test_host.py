"""The Gradio host: the engine's answers are plain generation's, whoever asks beside; bad input is one sentence."""

import asyncio
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from conftest import MINIATURE, ROOT
from gradio_client import Client, handle_file
from PIL import Image

import llava_gradio_lora_host as llava_host
from llava_orpo_training import generate_answers

SCRIPT = ROOT / "llava_gradio_lora_host.py"
PICTURES = sorted((MINIATURE / "amber" / "image").glob("*.webp"))
QUESTIONS = ["Describe this image.", "Name everything you can see in this image.", "Is there a cup in this image?"]


@pytest.fixture(scope="module")
def host():
    host = llava_host.Host(llava_host.parse_args(["--test_mode", "--max_num_seqs", "64"]))
    yield host
    host.engine.close()


@pytest.fixture
def endless(host, monkeypatch):
    """No token ends an answer, so that it grows until it is stopped or cut."""
    monkeypatch.setattr(host.engine, "ends", {-1})
    return host


@pytest.fixture(scope="module")
def address(host):
    """The page of the `host`, listening."""
    args = llava_host.parse_args(["--test_mode", "--max_num_seqs", "64", "--queue_size", "40"])
    page = llava_host.build_page(host, args)
    llava_host.launch_page(page, args, port=None)
    yield page.local_url.rstrip("/")
    page.close()


def plain(host, picture, question, adapter=True, max_new_tokens=100):
    """What generate_answers says, while the engine is at rest."""
    image = llava_host.load_image(picture)
    host.engine.switch(adapter)
    return generate_answers(host.engine.model, host.processor, [image], [question], max_new_tokens)[0]


def rest(engine, seconds=60):
    """Wait until nothing is generated any more."""
    deadline = time.monotonic() + seconds
    while engine.active or engine.open:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def ask(host, picture, question, session="a", sides=(True,), earlier=(), **sampling):
    """The last state of the answers, and how many states came before."""
    opened = llava_host.open_picture(picture.read_bytes(), host.processor)
    ids = llava_host.build_chat(host.processor, opened.image.size, question, list(earlier))
    sampling = {"temperature": 0, "top_p": 1, "max_new_tokens": 100, "mark": False} | sampling
    states = [answers async for answers in host.answer(opened, dict.fromkeys(sides, ids), session, **sampling)]
    return states[-1], len(states)


# ---------------------------------------------------------------------------- the engine


def test_32_users_at_once_get_their_own_right_answers(host):
    asked = [(PICTURES[number], QUESTIONS[number % 3]) for number in range(32)]
    widths = Counter()
    step = host.engine.step

    def count(batch):
        widths[len(batch.rows)] += 1
        step(batch)

    host.engine.step = count

    async def everyone():
        return await asyncio.gather(
            *[ask(host, picture, question, str(n), (False, True)) for n, (picture, question) in enumerate(asked)]
        )

    answers = asyncio.run(everyone())
    del host.engine.step
    assert max(widths) >= 8  # they were generated together
    for (picture, question), (states, _) in zip(asked, answers, strict=True):
        for adapter in (False, True):
            assert states[adapter].text == plain(host, picture, question, adapter)


def test_what_is_drawn_does_not_depend_on_other_users(host):
    def request(number, session, seed=0):
        picture = llava_host.open_picture(PICTURES[number].read_bytes(), host.processor)
        ids = llava_host.build_prompt(host.processor, QUESTIONS[0], picture.image.size)
        return llava_host.Request(ids, picture, session, True, 60, 1.3, 0.9, random.Random(number + seed))

    def run(requests):
        for each in requests:
            host.engine.submit(each)
        while not all(each.done for each in requests):
            time.sleep(0.01)
        return [each.tokens for each in requests]

    together = run([request(number, f"t{number}") for number in range(12)])
    assert together == [run([request(number, f"s{number}")])[0] for number in range(12)]
    assert together != run([request(number, f"u{number}", seed=100) for number in range(12)])


def test_a_follow_up_reuses_the_cache_and_changes_nothing(host):
    async def talk():
        first, _ = await ask(host, PICTURES[0], QUESTIONS[0], "talk")
        again, _ = await ask(host, PICTURES[0], QUESTIONS[2], "talk")
        turn = [(QUESTIONS[0], first[True].tokens)]
        chat, _ = await ask(host, PICTURES[0], QUESTIONS[1], "chat", earlier=turn)
        followed, _ = await ask(host, PICTURES[0], QUESTIONS[0], "talk")
        kept, _ = await ask(host, PICTURES[0], QUESTIONS[1], "talk", earlier=turn)
        other, _ = await ask(host, PICTURES[1], QUESTIONS[0], "talk")
        return first, again, chat, followed, kept, other

    first, again, chat, followed, kept, other = (states[True] for states in asyncio.run(talk()))
    assert "(reused)" not in first.line and "(reused)" not in chat.line and "(reused)" not in other.line
    assert all("(reused)" in answer.line for answer in (again, followed, kept))
    assert again.text == plain(host, PICTURES[0], QUESTIONS[2]) and followed.tokens == first.tokens
    assert other.text == plain(host, PICTURES[1], QUESTIONS[0])
    assert kept.tokens == chat.tokens  # the whole conversation, from the cache and computed anew


def test_a_conversation_is_one_prompt(host):
    tokenizer = host.processor.tokenizer
    ids = llava_host.build_chat(host.processor, (112, 112), "And a cup?", [("Is there a ball?", [396, 2])])
    start = llava_host.build_prompt(host.processor, "Is there a ball?", (112, 112))
    assert ids[: len(start) + 2] == [*start, 396, tokenizer.eos_token_id]
    assert tokenizer.decode(ids[len(start) + 2 :]) == "[INST] And a cup? [/INST]"
    stopped = llava_host.build_chat(host.processor, (112, 112), "And a cup?", [("Is there a ball?", [396])])
    assert stopped == ids  # an answer that was stopped is ended


def test_stop_ends_a_generation_before_its_next_token(endless):
    engine = endless.engine

    async def stop():
        asking = asyncio.create_task(ask(endless, PICTURES[0], QUESTIONS[0], "s", (False, True), max_new_tokens=900))
        other = asyncio.create_task(ask(endless, PICTURES[1], QUESTIONS[0], "other", max_new_tokens=120))
        while engine.active < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        mine = [request for request in engine.open if request.session == "s"]
        engine.stop_session("s")
        said = [len(request.tokens) for request in mine]
        states, _ = await asking
        assert len(mine) == 2 and all(
            len(request.tokens) - before <= 1 for request, before in zip(mine, said, strict=True)
        )
        return states, await other

    states, (kept_on, _) = asyncio.run(stop())
    rest(engine)
    assert all(answer.line.endswith("stopped") and 0 < len(answer.tokens) < 900 for answer in states.values())
    assert len(kept_on[True].tokens) == 120 and "cut off" in kept_on[True].line


@pytest.mark.parametrize("later", range(3))
def test_who_stops_reading_stops_the_generation(endless, later):
    """At whatever turn of the event loop after the first token: asyncio.wait_for of Python 3.11 loses a cancellation that
    comes just when what it waits for has happened."""

    async def leave():
        loop, requests = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe

        def turn(countdown):
            loop.call_soon(turn, countdown - 1) if countdown else task.cancel()

        def tell_and_leave(callback):
            call(callback)
            if not requests:
                requests.extend(endless.engine.open)
                call(turn, later)

        loop.call_soon_threadsafe = tell_and_leave
        task = asyncio.create_task(ask(endless, PICTURES[0], QUESTIONS[0], "gone", max_new_tokens=900))
        with pytest.raises(asyncio.CancelledError):
            await task
        return requests

    (request,) = asyncio.run(leave())
    rest(endless.engine)
    assert 0 < len(request.tokens) < 900


def test_what_a_user_leaves_behind_is_dropped(endless, monkeypatch):
    engine = endless.engine

    async def leave():
        tasks = [
            asyncio.create_task(ask(endless, PICTURES[n], QUESTIONS[0], "left", max_new_tokens=900)) for n in range(3)
        ]
        tasks.append(asyncio.create_task(ask(endless, PICTURES[4], QUESTIONS[0], "stays", max_new_tokens=150)))
        while engine.active < 4:
            await asyncio.sleep(0.01)
        engine.forget("left")
        waiting = asyncio.create_task(ask(endless, PICTURES[5], QUESTIONS[0], "waits", max_new_tokens=900))
        await asyncio.sleep(0.05)
        endless.engine.stop_session("waits")  # wherever it is
        await waiting
        return [(await task)[0][True] for task in tasks]

    *left, stays = asyncio.run(leave())
    rest(engine)
    assert all("stopped" in answer.line for answer in left) and len(stays.tokens) == 150
    assert ("stays", True) in engine.kept and ("left", True) not in engine.kept
    monkeypatch.setattr(llava_host, "KEPT_SECONDS", 0)
    engine.expire()
    assert not engine.kept


def test_a_check_that_nobody_waits_for_harms_nobody(host):
    picture = llava_host.open_picture(PICTURES[0].read_bytes(), host.processor)

    async def check():
        dropped = [asyncio.create_task(host.doubt(picture, ["cup", "ball"], False)) for _ in range(30)]
        kept = [asyncio.create_task(host.doubt(picture, ["cup"], number % 2 == 0)) for number in range(20)]
        await asyncio.sleep(0)
        for task in dropped:
            task.cancel()
        return await asyncio.gather(*kept)

    assert set(map(frozenset, asyncio.run(asyncio.wait_for(check(), 30)))) <= {frozenset(), frozenset({"cup"})}
    assert host.engine.thread.is_alive()


def test_places_are_limited_and_given_in_order(endless, monkeypatch):
    monkeypatch.setattr(endless.engine, "max_num_seqs", 3)
    seen = []

    async def many():
        tasks = [
            asyncio.create_task(ask(endless, PICTURES[n], QUESTIONS[0], f"m{n}", max_new_tokens=20 + n))
            for n in range(8)
        ]
        while not all(task.done() for task in tasks):
            seen.append(endless.engine.active)
            await asyncio.sleep(0.005)
        return [len((await task)[0][True].tokens) for task in tasks]

    assert asyncio.run(many()) == [20 + n for n in range(8)] and max(seen) == 3


def test_who_waits_is_told_and_who_is_too_many_is_refused(endless, monkeypatch):
    monkeypatch.setattr(endless.engine, "max_num_seqs", 1)
    monkeypatch.setattr(endless, "queue_size", 2)

    async def line(number):
        opened = llava_host.open_picture(PICTURES[number].read_bytes(), endless.processor)
        ids = llava_host.build_chat(endless.processor, opened.image.size, QUESTIONS[0], [])
        answer = endless.answer(opened, {True: ids}, f"q{number}", False, temperature=0, top_p=1, max_new_tokens=150)
        return {states[True].line.split(" · ")[0] async for states in answer}

    async def many():
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(line(number)))
            await asyncio.sleep(0.1)
        return await asyncio.gather(*tasks, return_exceptions=True)

    *lines, refused = asyncio.run(many())
    assert "The queue is full: 2 answers wait" in str(refused) and isinstance(refused, llava_host.Refused)
    assert (
        "waiting for a place, 0 before this one …" in lines[1]
        and "waiting for a place, 1 before this one …" in lines[2]
    )


def test_memory_bounds(host, monkeypatch):
    engine = host.engine
    row = 140 * engine.token_bytes
    monkeypatch.setattr(engine, "kept_room", 2 * row)
    for number in range(5):
        asyncio.run(ask(host, PICTURES[0], QUESTIONS[2], f"kept{number}"))
    rest(engine)
    assert list(engine.kept) == [("kept3", True), ("kept4", True)]  # the last two, for which there is room
    engine.forget("kept4")
    assert ("kept4", True) not in engine.kept
    monkeypatch.setattr(engine, "room", 110)
    question = "Is there a cup in this image? " * 5
    with pytest.raises(ValueError, match="the model here takes 110; shorten the question"):
        asyncio.run(ask(host, PICTURES[0], question))
    states, _ = asyncio.run(ask(host, PICTURES[0], QUESTIONS[0]))
    assert 1 < len(states[True].tokens) < 14 and "cut off" in states[True].line  # where the context ends
    monkeypatch.setattr(engine, "room", 300)

    async def two():  # of 200 tokens each in room for 300: one after the other
        return await asyncio.gather(*[ask(host, PICTURES[n], QUESTIONS[0], f"b{n}") for n in range(2)])

    assert [states[True].text for states, _ in asyncio.run(two())] == [
        plain(host, PICTURES[n], QUESTIONS[0]) for n in range(2)
    ]


def test_a_failure_costs_one_batch_and_not_the_server(host, monkeypatch):
    def fail(batch):
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(host.engine, "step", fail)
    with pytest.raises(ValueError, match="failed on this question"):
        asyncio.run(ask(host, PICTURES[0], QUESTIONS[0]))
    monkeypatch.undo()
    assert asyncio.run(ask(host, PICTURES[0], QUESTIONS[0]))[0][True].text == plain(host, PICTURES[0], QUESTIONS[0])


def test_tokens_are_drawn_as_nucleus_sampling_says():
    chances = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = chances.log().repeat(4000, 1)[:, torch.tensor([2, 0, 3, 1])]  # token 1 is the likeliest, then 3, 0, 2

    def draw(temperature, top_p):
        dice = [random.Random(number) for number in range(len(logits))]
        count = Counter(llava_host.pick_tokens(logits, [temperature] * 4000, [top_p] * 4000, dice))
        return [count[token] / 4000 for token in (1, 3, 0, 2)]

    assert draw(0, 1) == [1, 0, 0, 0] == draw(1, 0.4)
    assert draw(1, 1) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert draw(1, 0.75) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert draw(0.5, 1) == pytest.approx((chances**2 / (chances**2).sum()).tolist(), abs=0.03)
    several = [
        llava_host.pick_tokens(logits[:3], [0, 1, 1], [1, 0.4, 1], [None, random.Random(n), random.Random(n)])
        for n in range(50)
    ]
    assert {tokens[0] for tokens in several} == {1} == {tokens[1] for tokens in several}  # each row has its own top-p
    assert {tokens[2] for tokens in several} == {0, 1, 2, 3}


# ---------------------------------------------------------------------------- pictures and questions


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that says it has this size, and has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED = Image.new("RGB", (60, 40), (200, 10, 10))
REFUSED = {
    "none": (None, "no picture yet"), "empty": (b"", "0 bytes"), "text": (b"I am no picture", "no picture that can be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "no picture that can be read"),
    "100 megapixels": (png_header(10_000, 10_000), "50 megapixels"), "bomb": (png_header(60_000, 60_000), "50 megapixels"),
    "cut off": (encode(Image.effect_noise((400, 400), 50), "JPEG")[:5000], "damaged"), "no pixels": (png_header(80, 80), "damaged"),
    "big file": (bytes(20_000_001), "20 MB"[:2]), "strip": (encode(Image.new("RGB", (1000, 2))), "too narrow"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_is_refused_gets_one_sentence(host, name):
    data, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as refused:
        llava_host.open_picture(data, host.processor)
    assert str(refused.value).count(". ") == 0


def test_odd_pictures_are_seen_as_they_look(host):
    def seen(data):
        return np.asarray(llava_host.open_picture(data, host.processor).image).astype(int)

    assert abs(seen(encode(RED.convert("CMYK"), "JPEG", quality=95)).mean((0, 1)) - [200, 10, 10]).max() < 8
    grey = Image.fromarray(np.full((40, 60), 128 * 257, np.uint16))
    assert set(seen(encode(grey)).ravel()) == {128}  # 16 bits a pixel
    floats = Image.fromarray(np.linspace(0, 3, 60 * 40, dtype=np.float32).reshape(40, 60))
    assert seen(encode(floats, "TIFF"))[[0, -1], [0, -1], 0].tolist() == [0, 255]
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 30, 40))
    assert seen(encode(clear))[0, [0, 59]].tolist() == [[0, 0, 255], [255, 255, 255]]  # transparent on white
    frames = encode(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "blue")] * 3)
    assert abs(seen(frames)[0, 0] - [200, 10, 10]).max() < 8  # the first frame
    turned = Image.new("RGB", (60, 40), "blue")
    turned.paste((255, 0, 0), (0, 0, 30, 40))
    exif = turned.getexif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    shown = seen(encode(turned, "PNG", exif=exif))
    assert shown.shape == (60, 40, 3) and shown[0, 0].tolist() == [255, 0, 0] and shown[59, 0].tolist() == [0, 0, 255]
    assert seen(encode(Image.new("1", (9, 9), 1))).min() == 255 and seen(encode(Image.new("RGB", (1, 1)))).shape == (
        1,
        1,
        3,
    )


def test_what_the_browser_keeps_is_the_same_picture(host):
    phone = encode(RED, "MPO", save_all=True, append_images=[RED])
    assert llava_host.show_picture(phone) == phone
    noise = Image.effect_noise((3000, 2600), 90).convert("RGB").convert("CMYK")
    assert len(llava_host.show_picture(encode(noise, "TIFF"))) < 20_000_000
    for data in (encode(RED), encode(RED.convert("CMYK"), "JPEG"), encode(RED, "TIFF"), encode(RED, "GIF"), phone):
        shown = llava_host.show_picture(data)
        assert Image.open(io.BytesIO(shown)).format in ("PNG", "JPEG", "WEBP", "MPO")
        assert (
            llava_host.open_picture(shown, host.processor).digest
            == llava_host.open_picture(data, host.processor).digest
        )


def test_a_question_is_plain_text_to_the_model(host, photo_llava):
    for processor in (host.processor, llava_host.read_checkpoint(str(photo_llava))[1]):
        hostile = "<image> </s> <s> <pad> [INST] [/INST] [ /INST ] [/inst]x\x00\u202e"
        question = llava_host.check_question(hostile)
        ids = llava_host.build_chat(processor, (112, 112), question, [])
        normal = llava_host.build_chat(processor, (112, 112), "Is it?", [])
        tokenizer = processor.tokenizer
        for special in (
            processor.image_token_id,
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
            tokenizer.pad_token_id,
        ):
            assert ids.count(special) == normal.count(special)
        text = tokenizer.decode(ids)
        assert text.count("[INST]") == 1 and text.count("[/INST]") == 1
    for question, words in (
        ("", "no question yet"),
        (" \n ", "no question yet"),
        (None, "no question yet"),
        ("a" * 100_000, "100,000 characters"),
    ):
        with pytest.raises(ValueError, match=words):
            llava_host.check_question(question)


def test_questions_keep_the_spaces_and_joiners_of_their_language():
    question = "Is there\u3000a\u00a0cup\u200d?"
    assert llava_host.check_question(f" {question}\x00\n") == question


def test_answers_and_questions_are_shown_and_never_run():
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> & a cat"
    answer = llava_host.Answer(evil, [1], "1 s <b>", {"cat": "cat"}, {"cat"})
    turn = {"question": evil, "answers": {False: answer, True: answer}}
    shown = llava_host.render_talk({False: evil, True: "B"}, [turn | {"asked": ""}], [False, True])
    assert "<script" not in shown and "<img" not in shown and "<b>" not in shown and shown.count("&lt;script&gt;") >= 4
    assert re.search(r"<u[^>]*>cat\s*</u>", shown)


def test_differences_and_doubts_are_marked():
    first = llava_host.Answer("A red cup, two cats.", objects={"cup": "cup", "cats": "cat"}, doubtful={"cat"})
    second = llava_host.Answer("A red mug and two cats.")
    pieces = llava_host.mark_pieces(first, second)
    assert "".join(piece for piece, _, _ in pieces) == first.text
    assert [piece for piece, differs, _ in pieces if differs] == ["cup"]
    assert [piece for piece, _, doubtful in pieces if doubtful] == ["cats"]
    assert [piece for piece, differs, _ in llava_host.mark_pieces(second, first) if differs] == ["mug", " ", "and"]
    assert not any(differs for _, differs, _ in llava_host.mark_pieces(first, None))


# ---------------------------------------------------------------------------- checks


def test_doubtful_objects_are_those_the_base_denies(host):
    states, _ = asyncio.run(ask(host, PICTURES[3], QUESTIONS[0], "doubt", (False, True), mark=True))
    named = {word for answer in states.values() for word in answer.objects.values()}
    denied = {word for word in named
              if plain(host, PICTURES[3], f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?", False) != "Yes"}  # fmt: skip
    assert denied and named - denied
    for answer in states.values():
        assert answer.doubtful == denied & set(answer.objects.values())


def test_verify_keeps_the_candidate_that_its_check_confirms_best(host, monkeypatch):
    assert llava_host.choose_candidate([["cat", "dog"], ["cat"], ["cup", "cat"]], {"dog"}) == 2
    assert llava_host.choose_candidate([["cat"], ["cup"]], set()) == 0
    assert llava_host.choose_candidate([["cat"], ["cup"]], {"cat"}, [0.3, 0.2]) == 0
    monkeypatch.setattr(host, "candidates", 6)
    random.seed(0)
    drawn = []
    describe = host.describe
    monkeypatch.setattr(host, "describe", lambda request: drawn.append(request) or describe(request))
    states, _ = asyncio.run(ask(host, PICTURES[3], QUESTIONS[0], "verify", (False,)))
    candidates = list({id(request): request for request in drawn}.values())
    assert (
        len(candidates) == 6
        and candidates[0].temperature == 0
        and candidates[1].temperature == llava_host.VERIFY_TEMPERATURE
    )
    texts = [describe(request).text for request in candidates]
    assert len(set(texts)) > 2 and texts[0] == plain(host, PICTURES[3], QUESTIONS[0], False)
    named = [[word for _, word in host.find(text)] for text in texts]
    words = {word for part in named for word in part}
    denied = {word for word in words
              if plain(host, PICTURES[3], f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?", False) != "Yes"}  # fmt: skip
    wrong = [len(set(part) & denied) for part in named]
    assert wrong[0] > min(wrong) and states[False].text in [
        text for text, n in zip(texts, wrong, strict=True) if n == min(wrong)
    ]


# ---------------------------------------------------------------------------- the server


def kept_files(monkeypatch):
    """What is left of the uploads once their time is over."""
    assert all(path in llava_host.READ for path in llava_host.UPLOADS.rglob("*") if path.is_file())
    with monkeypatch.context() as patched:
        patched.setattr(llava_host, "READ_SECONDS", -1)
        llava_host.sweep_uploads()
    return [path for path in llava_host.UPLOADS.rglob("*") if path.is_file() or len(path.name) == 64]  # a file's digest


def test_the_api_streams_and_keeps_no_picture(host, address, monkeypatch):
    job = Client(address, verbose=False).submit(
        handle_file(str(PICTURES[0])), QUESTIONS[0], adapter=False, temperature=0, top_p=1, max_new_tokens=60, api_name="/answer"
    )  # fmt: skip
    assert job.result(timeout=60) == plain(host, PICTURES[0], QUESTIONS[0], False)
    parts = job.outputs()
    assert len(parts) > 2 and all(whole.startswith(part) for part, whole in zip(parts, parts[1:], strict=False))
    assert not kept_files(monkeypatch)


def test_users_with_the_same_file_do_not_take_it_from_each_other(host, address):
    clients = [Client(address, verbose=False) for _ in range(3)]

    def user(number):
        return clients[number % 3].predict(
            handle_file(str(PICTURES[7])), QUESTIONS[0], True, 0, 1, 60, api_name="/answer"
        )

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(user, range(12))) == {plain(host, PICTURES[7], QUESTIONS[0])}


def test_uploads_that_nobody_asks_about_go_too(address, monkeypatch):
    llava_host.sweep_uploads()
    uploaded = httpx.post(f"{address}/gradio_api/upload", files={"files": ("left.webp", b"left")}).json()[0]
    llava_host.sweep_uploads()
    assert os.path.exists(uploaded)
    monkeypatch.setattr(llava_host, "UNREAD_SECONDS", -1)
    llava_host.sweep_uploads()
    assert not os.path.exists(uploaded)


def test_a_long_answer_that_repeats_itself_is_compared_quickly():
    loops = [" ".join(words * 300) for words in (["a", "red", "cup"], ["the", "red", "cup", "and"])]
    started = time.perf_counter()
    pieces = llava_host.mark_pieces(llava_host.Answer(loops[0]), llava_host.Answer(loops[1]))
    assert time.perf_counter() - started < 1 and "".join(piece for piece, _, _ in pieces) == loops[0]


def test_a_failing_check_loses_no_answer(host, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(llava_host, "find_doubtful", fail)
    states, _ = asyncio.run(ask(host, PICTURES[3], QUESTIONS[0], mark=True))
    assert states[True].text == plain(host, PICTURES[3], QUESTIONS[0]) and states[True].line.endswith("not checked")


def test_with_clip_it_is_clip_that_checks(host, monkeypatch):
    class Fake:
        def compare(self, image, texts):
            return [
                0.5 if text == "a photo" else 0.9 if "photo" in text and "tent" not in text else len(text) / 1000
                for text in texts
            ]

    for holder in (host, host.engine):
        monkeypatch.setattr(holder, "clip", Fake())
    states, _ = asyncio.run(ask(host, PICTURES[3], QUESTIONS[0], "clip", mark=True))
    assert states[True].doubtful == {"tent"}
    monkeypatch.setattr(host, "candidates", 5)
    drawn = {}
    describe = host.describe
    monkeypatch.setattr(host, "describe", lambda request: describe(drawn.setdefault(id(request), request)))
    states, _ = asyncio.run(ask(host, PICTURES[3], QUESTIONS[0], "clip", (False,)))
    assert states[False].text == max((describe(request).text for request in drawn.values()), key=len)
    assert asyncio.run(ask(host, PICTURES[3], QUESTIONS[2], "clip", (False,)))[0][False].text == plain(
        host, PICTURES[3], QUESTIONS[2], False)  # fmt: skip


def test_users_at_once_through_the_api(host, address):
    clients = [Client(address, verbose=False) for _ in range(8)]

    def user(number):
        return clients[number % 8].predict(
            handle_file(str(PICTURES[number])), QUESTIONS[number % 3], True, 0, 1, 100, api_name="/answer"
        )

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(user, range(32)))
    assert answers == [plain(host, PICTURES[number], QUESTIONS[number % 3]) for number in range(32)]


def call(address, data):
    """The API as curl uses it: the last event and its data."""
    event = httpx.post(f"{address}/gradio_api/call/answer", json={"data": data}, timeout=60).json()["event_id"]
    lines = httpx.get(f"{address}/gradio_api/call/answer/{event}", timeout=60).text.split("\n")
    events = [line[7:] for line in lines if line.startswith("event: ")]
    content = [line[6:] for line in lines if line.startswith("data: ")]
    return events[-1], json.loads(content[-1])


def inline(picture):
    return {"url": f"data:image/webp;base64,{llava_host.base64.b64encode(picture).decode()}"}


def test_hostile_calls_get_a_sentence_and_the_server_lives_on(host, address, tmp_path, monkeypatch):
    victim = tmp_path / "victim.webp"
    victim.write_bytes(PICTURES[0].read_bytes())
    uploaded = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("mine.webp", PICTURES[1].read_bytes())}
    ).json()[0]
    for asked in (uploaded, os.path.relpath(uploaded)):
        assert httpx.get(f"{address}/gradio_api/file={asked}").status_code in (403, 404)  # it is served to nobody
    good = inline(PICTURES[0].read_bytes())
    for data, words in (
        ([inline(b"no picture"), "Is it?", True, 0, 1, 20], "no picture that can be read"),
        ([{"url": "data:;base64,%%%"}, "Is it?", True, 0, 1, 20], "picture"),
        ([None, "Is it?", True, 0, 1, 20], "no picture yet"),
        ([good, "", True, 0, 1, 20], "no question yet"),
        ([good, "a" * 100_000, True, 0, 1, 20], "100,000 characters"),
        ([good, "Is it?", True, -1, 1, 20], "temperature must be"),
        ([good, "Is it?", True, 0, 1, 10**9], "max_new_tokens"),
        ([good, "Is it?", True, 0, 0, 20], "top_p"),
        (
            [{"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}, "Is it?", True, 0, 1, 20],
            "no pictures from",
        ),
        ([{"path": str(SCRIPT), "meta": {"_type": "gradio.FileData"}}, "Is it?", True, 0, 1, 20], ""),
        ([{"path": str(victim)}, "Is it?", True, 0, 1, 20], "no uploaded picture"),
        ([{"path": f"{llava_host.UPLOADS}/../{victim.name}"}, "Is it?", True, 0, 1, 20], "no uploaded picture"),
        ([{"path": "/dev/zero"}, "Is it?", True, 0, 1, 20], "no uploaded picture"),
        ([good, "Is it?", True, None, 1, 20], "temperature must be"),
        ([good, "\u200b \u3000", True, 0, 1, 20], "no question yet"),
    ):
        event, content = call(address, data)
        assert event == "error" and words in str(content), (data, content)
    assert SCRIPT.exists() and victim.exists()
    assert httpx.get(f"{address}/gradio_api/deep_link?session_hash=x").status_code == 404
    assert call(address, [{"path": uploaded}, QUESTIONS[0], True, 0, 1, 60])[0] == "complete"
    assert httpx.post(f"{address}/gradio_api/call/answer", content=b"x" * 31_000_000).status_code == 413
    big = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(21_000_000))})
    assert big.status_code == 413
    assert call(address, [good, QUESTIONS[0], True, 0, 1, 60]) == ("complete", [plain(host, PICTURES[0], QUESTIONS[0])])
    assert not kept_files(monkeypatch)


def test_a_curl_user_who_leaves_costs_nothing_more(endless, address):
    event = httpx.post(
        f"{address}/gradio_api/call/answer",
        json={"data": [inline(PICTURES[0].read_bytes()), QUESTIONS[0], True, 0, 1, 800]},
    ).json()["event_id"]
    with httpx.stream("GET", f"{address}/gradio_api/call/answer/{event}") as stream:
        next(stream.iter_lines())
        (request,) = endless.engine.open
    rest(endless.engine)
    assert len(request.tokens) < 300


def test_the_readmes_examples_work(host, address, tmp_path):
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    Image.open(PICTURES[0]).convert("RGB").save(tmp_path / "photo.jpg", quality=100, subsampling=0)
    expected = plain(host, tmp_path / "photo.jpg", QUESTIONS[0])
    for language, words in (("python", "gradio_client"), ("bash", "call/answer")):
        text = next(text for kind, text in blocks if kind == language and words in text)
        assert "http://127.0.0.1:7860" in text
        command = [sys.executable, "-c"] if language == "python" else ["bash", "-euc"]
        run = subprocess.run([*command, text.replace("http://127.0.0.1:7860", address)], cwd=tmp_path, capture_output=True, text=True,
                             timeout=60)  # fmt: skip
        lines = [line for line in run.stdout.splitlines() if line.strip()]
        assert run.returncode == 0 and expected in lines[-1] and len(lines) > 4, run


def start(tmp_path, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "--test_mode", "--port", str(port), *map(str, flags)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}")
            return server, port
        except httpx.ConnectError:
            time.sleep(0.5)
    raise AssertionError((tmp_path / "log").read_text())


def test_only_users_of_the_auth_file_come_in_and_a_taken_port_is_one_sentence(tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("# who may\nann:pass:word\n\nbob:secret\n")
    server, port = start(tmp_path, "--auth_file", users, "--queue_size", "1", "--max_num_seqs", "1")
    try:
        address = f"http://127.0.0.1:{port}"
        assert httpx.post(f"{address}/gradio_api/call/answer", json={"data": []}).status_code == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|credentials"):
            Client(address, auth=("ann", "wrong"), verbose=False)
        client = Client(address, auth=("ann", "pass:word"), verbose=False)
        assert client.predict(handle_file(str(PICTURES[0])), QUESTIONS[2], True, 0, 1, 20, api_name="/answer") in (
            "Yes",
            "No",
        )
        jobs = [
            client.submit(handle_file(str(PICTURES[n])), QUESTIONS[0], True, 1.5, 1, 900, api_name="/answer")
            for n in range(6)
        ]
        ends = [job.exception(timeout=200) for job in jobs]
        assert None in ends and any("queue is full" in str(end).lower() for end in ends if end)
        taken = subprocess.run(
            [sys.executable, str(SCRIPT), "--test_mode", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert taken.returncode == 2 and re.search(
            rf"error: --host 127.0.0.1 --port {port} cannot be listened on \(Address already in use\); name another",
            taken.stderr,
        )
        listening = subprocess.run(["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True)
        assert listening.returncode or f"127.0.0.1:{port}" in listening.stdout
    finally:
        server.terminate()
        assert server.wait(20) == 143 and not list(tmp_path.glob("llava_host_*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--verify", "0"], "above 0"), (["--max_new_tokens", "-1"], "above 0"), (["--temperature", "3"], "from 0 to 2"),
     (["--port", "99999"], "--port is 99999"), (["--auth_file", "nowhere.txt"], "nowhere.txt cannot be read"),
     (["--auth_file", str(SCRIPT)], "name:password"), (["--model_path", "nowhere"], "--model_path nowhere"),
     (["--test_mode", "--lora_path", "nowhere"], "--lora_path nowhere"), (["--test_mode", "--host", "192.0.2.1"], "--host 192.0.2.1"),
     (["--test_mode", "--clip_model", "nowhere"], "--clip_model nowhere"), (["--load_4bit", "--load_8bit"], "not allowed")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        llava_host.main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in error and words in error


def test_help_lists_every_flag():
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ["model_path", "lora_path", "device", "load_8bit", "load_4bit", "host", "port", "share", "auth_file", "max_new_tokens", "temperature", "test_mode", "verify", "clip_model"]:  # fmt: skip
        assert f"--{flag}" in text
