"""The Gradio host's page in a browser: streaming, side by side, Stop, Regenerate, Clear, Save, and what it refuses."""

import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from conftest import MINIATURE
from PIL import Image
from playwright.sync_api import Error, expect, sync_playwright
from test_host import PICTURES, encode, kept_files, plain, rest

import llava_gradio_lora_host as llava_host

expect.set_options(timeout=30_000)  # both cores may be busy
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures of the page in


@pytest.fixture(scope="module")
def server():
    """The host and its page's address."""
    args = llava_host.parse_args(["--test_mode", "--max_new_tokens", "900"])
    host = llava_host.Host(args)
    page = llava_host.build_page(host, args)
    llava_host.launch_page(page, args, port=None)
    yield host, page.local_url
    page.close()
    host.engine.close()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error:
            if "CI" in os.environ:
                raise
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.problems, page.requested = [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: (page.problems.append("a script ran"), dialog.dismiss()))
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(server[1])
    expect(page.locator("#send")).to_be_visible()
    yield page
    page.close()
    assert not page.problems


def give(page, picture):
    """Upload a picture's file, from a path or as (name, type, bytes)."""
    if not isinstance(picture, Path):
        picture = dict(zip(("name", "mimeType", "buffer"), picture, strict=True))
    page.locator("#picture input[type=file]").set_input_files(picture)


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()


def finished(page, turns=1):
    expect(page.locator(".base .answer")).to_have_count(turns)  # begun
    expect(page.locator("#again")).to_be_enabled()


def shown(page, column):
    return page.locator(f".{column} .answer").first.inner_text()


def test_two_columns_stream_and_mark_what_differs(server, page, monkeypatch):
    host, _ = server
    give(page, PICTURES[16])
    expect(page.locator("#picture img")).to_be_visible()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector('.base .answer')?.innerText || ''))
                   .observe(document.querySelector('#talk'), {childList: true, subtree: true, characterData: true}) }"""
    )
    page.get_by_text("Describe this image.").click()
    expect(page.locator("#question textarea")).to_have_value("Describe this image.")
    page.locator("#question textarea").press("Enter")
    finished(page)
    base, aligned = (plain(host, PICTURES[16], "Describe this image.", adapter) for adapter in (False, True))
    assert base != aligned and (shown(page, "base"), shown(page, "aligned")) == (base, aligned)
    partial = [text for text in dict.fromkeys(page.evaluate("window.seen")) if text and text != base]
    assert len(partial) > 1 and all(base.startswith(text) for text in partial)  # it streamed
    marked = page.locator(".base mark").all_inner_texts()
    assert "house" in marked and "The" not in marked
    assert (
        page.locator(".base u").all_inner_texts() == ["house"] and not page.locator(".aligned u").count()
    )  # it is not there
    line = page.locator(".aligned .cost").inner_text()
    for words in ("s to first token", "tokens/s", " image tokens", "miniature/model + miniature/adapter"):
        assert words in line
    assert all(url.startswith((server[1], "data:", "blob:")) for url in page.requested)  # nothing goes anywhere else
    assert not kept_files(monkeypatch)  # and nothing is kept
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / "host.png")

    before = page.locator("#picture img").get_attribute("src")
    page.locator("#examples .gallery-item").nth(1).click()  # a pair is not saved with another picture
    expect(page.locator("#picture img")).not_to_have_attribute("src", before)
    page.locator("#save").click()
    expect(page.locator(".notice")).to_contain_text("another picture")
    page.locator("#examples .gallery-item").first.click()
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Temperature").fill("1.5")
    page.get_by_label("number input for Temperature").blur()
    time.sleep(0.5)
    with page.expect_download() as download:
        page.locator("#save").click()
    page.get_by_label("number input for Temperature").fill("0")
    page.get_by_label("number input for Temperature").blur()
    with zipfile.ZipFile(download.value.path()) as saved:
        pair = json.loads(saved.read("pair.json"))
        picture = Image.open(io.BytesIO(saved.read("pair.png")))
    assert [answer["answer"] for answer in pair["answers"]] == [base, aligned] and pair["answers"][0]["doubtful"] == [
        "house"
    ]
    assert pair["temperature"] == 0  # with which they were given
    assert pair["question"] == "Describe this image." and picture.width == 1200 and picture.height > 500
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(255, 224, 138), (221, 51, 51)} <= colours  # the marks of differences and of doubts
    if SCREENSHOTS:
        picture.save(Path(SCREENSHOTS) / "host_pair.png")

    ask(page, "Is there a house in this image?")
    finished(page, turns=2)
    assert shown(page, "aligned") in ("Yes", "No") and "(reused)" in page.locator(".aligned .cost").first.inner_text()
    page.locator("#clear").click()
    expect(page.locator(".base .answer")).to_have_count(0)
    expect(page.locator("#picture img")).to_have_count(0)
    expect(page.locator("#save")).to_be_disabled()


def test_regenerate_settings_views_and_examples(server, page):
    page.locator("#examples .gallery-item").nth(4).click()
    expect(page.locator("#picture img")).to_be_visible()
    page.get_by_text("Settings").click()
    page.get_by_label("Aligned only").check()
    expect(page.locator(".base .column")).to_be_hidden()
    page.get_by_label("number input for Temperature").fill("1.5")
    page.get_by_label("number input for Temperature").blur()
    ask(page, "Describe this image.")
    expect(page.locator("#again")).to_be_enabled()
    texts = {shown(page, "aligned")}
    for _ in range(3):
        page.locator("#again").click()
        expect(page.locator("#again")).to_be_disabled()
        expect(page.locator("#again")).to_be_enabled()
        expect(page.locator(".aligned .answer")).to_have_count(1)  # in place of the last one
        texts.add(shown(page, "aligned"))
    assert len(texts) > 1
    page.get_by_label("number input for Temperature").fill("0")
    page.get_by_label("number input for Answer length").fill("5")
    page.get_by_label("number input for Answer length").blur()
    page.locator("#again").click()
    expect(page.locator(".aligned .cost")).to_contain_text("cut off at the answer length")
    assert plain(server[0], PICTURES[3], "Describe this image.").startswith(shown(page, "aligned"))


def test_a_refusal_loses_neither_question_nor_conversation(server, page, monkeypatch):
    page.locator("#examples .gallery-item").first.click()
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "Is there a cup in this image?")
    finished(page)
    said = shown(page, "base")
    monkeypatch.setattr(server[0], "queue_size", 0)
    page.locator("#again").click()
    expect(page.locator(".notice")).to_contain_text("The queue is full")
    assert shown(page, "base") == said
    ask(page, "And a ball?")
    expect(page.locator("#question textarea")).to_have_value("And a ball?")
    expect(page.locator("#again")).to_be_enabled()
    monkeypatch.undo()
    page.locator("#send").click()
    finished(page, turns=2)


def test_stop_and_leaving_end_the_generation(server, page, browser, monkeypatch):
    engine = server[0].engine
    monkeypatch.setattr(engine, "ends", {-1})  # an answer grows until it is stopped
    give(page, PICTURES[0])
    expect(page.locator("#picture img")).to_be_visible()
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Answer length").fill("900")
    page.get_by_label("number input for Answer length").blur()
    ask(page, "Describe this image.")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".base .answer")).to_contain_text("The image")
    requests = list(engine.open)
    page.locator("#stop").click()
    rest(engine)
    assert len(requests) == 2 and all(len(request.tokens) < 300 for request in requests)
    finished(page)
    assert "stopped" in page.locator(".base .cost").inner_text() and "The image" in shown(page, "aligned")

    page.locator("#again").click()
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".base .answer")).to_contain_text("The image")
    requests = list(engine.open)
    page.locator("#clear").click()  # in the middle
    expect(page.locator(".base .answer")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    rest(engine)
    assert len(requests) == 2 and all(len(request.tokens) < 300 for request in requests)
    time.sleep(1)
    assert page.locator(".base .answer").count() == 0 and page.locator("#stop").is_hidden()

    other = browser.new_page()
    other.goto(server[1])
    other.locator("#examples .gallery-item").first.click()
    expect(other.locator("#picture img")).to_be_visible()
    other.get_by_text("Settings").click()
    other.get_by_label("number input for Answer length").fill("900")
    other.get_by_label("number input for Answer length").blur()
    ask(other, "Describe this image.")
    expect(other.locator(".base .answer")).to_contain_text("The image")
    requests = list(engine.open)
    other.close()
    rest(engine)
    assert len(requests) == 2 and all(len(request.tokens) < 300 for request in requests)


@pytest.mark.parametrize(
    ("picture", "words"),
    [(("a.png", "image/png", b""), "empty"), (("a.jpg", "image/jpeg", b"no picture"), "no picture that can be read"),
     (("a.png", "image/png", encode(Image.new("1", (10_000, 10_000)))), "50 megapixels")],
)  # fmt: skip
def test_a_bad_picture_gets_a_sentence_and_the_page_goes_on(server, page, picture, words, monkeypatch):
    give(page, picture)
    expect(page.locator(".notice, .toast-body").first).to_contain_text(words)
    assert not kept_files(monkeypatch)
    page.locator("#examples .gallery-item").first.click()
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "Is there a cup in this image?")
    finished(page)
    expect(page.locator(".notice")).to_have_count(0)


def test_what_is_missing_is_said_and_html_is_never_run(server, page):
    page.locator("#send").click()
    expect(page.locator(".notice")).to_contain_text("There is no picture yet")
    give(page, ("a.gif", "image/gif", encode(Image.open(MINIATURE / "amber" / "image" / PICTURES[0].name), "GIF")))
    expect(page.locator("#picture img")).to_have_attribute("src", llava_host.re.compile("^data:image/png"))
    page.locator("#send").click()
    expect(page.locator(".notice")).to_contain_text("There is no question yet")
    evil = "<img src=x onerror=alert(1)> <script>alert(2)</script> **cup**?"
    ask(page, evil)
    finished(page)
    assert page.locator(".question").inner_text() == evil
    assert page.locator("#talk img, #talk script").count() == 0


def test_a_phone_sized_window(server, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(server[1])
    page.locator("#examples .gallery-item").first.click()
    expect(page.locator("#picture img")).to_be_visible()
    ask(page, "Describe this image.")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing to scroll sideways
    base, aligned = (page.locator(f".{side} .answer").bounding_box() for side in ("base", "aligned"))
    assert (
        aligned["y"] > base["y"] + base["height"] and min(base["width"], aligned["width"]) > 280
    )  # one above the other
    expect(page.locator(".aligned .side")).to_be_visible()  # and each says whose it is
    if SCREENSHOTS:
        page.locator("#talk").scroll_into_view_if_needed()
        page.screenshot(path=Path(SCREENSHOTS) / "host_phone.png")
    page.close()
