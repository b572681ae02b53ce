"""The LoRA host's page in a browser: one picture, one question, two answers; stop, follow-ups, new pictures, a phone."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Error, expect, sync_playwright
from test_host import PICTURES, REFUSED, endless, engine, plain, rest  # noqa: F401

import llava_gradio_lora_host as host

pytestmark = pytest.mark.slow

expect.set_options(timeout=30_000)  # both cores may be busy
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures of the page in
CAPTION = "Describe this image."


@pytest.fixture(scope="module")
def address(engine):  # noqa: F811
    page = host.build_page(engine, "Base `miniature/model`, adapter `miniature/adapter`", 900, False, 8, 64)
    host.launch_page(page)
    yield page.local_url
    page.close()


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
def open_page(address, browser):
    """A function that opens the page, of a width in pixels, light or dark."""
    pages, problems = [], []

    def open_one(width=1280, height=800, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append("a script ran"), dialog.dismiss()))
        page.goto(f"{address}?__theme={theme}")
        expect(page.locator("#question textarea")).to_be_visible()
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not problems


def give(page, picture):
    """Upload a picture, from a path or as (name, bytes)."""
    if not isinstance(picture, Path):
        picture = {"name": picture[0], "mimeType": "image/png", "buffer": picture[1]}
    page.locator("#picture input[type=file]").set_input_files(picture)


def example(page, number):
    page.locator("#examples .gallery-item").nth(number).click()
    expect(page.locator("#picture img")).to_be_visible()


def ask(page, question):
    page.locator("#question textarea").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def finished(page, turns=1):
    expect(page.locator("#answers article")).to_have_count(turns)  # begun
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def shown(page, model, turn=0):
    return page.locator(f"#answers section[aria-label={model}] p").nth(turn).inner_text()


def test_two_answers_stream_and_what_differs_is_marked(engine, open_page):  # noqa: F811
    page = open_page()
    give(page, PICTURES[16])
    expect(page.locator("#picture img")).to_be_visible()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector('#answers p')?.innerText || ''))
                   .observe(document.querySelector('#answers'), {childList: true, subtree: true, characterData: true}) }"""
    )
    page.get_by_role("button", name="Ask", exact=True).click()  # an empty question asks for a description
    finished(page)
    base, adapter = (plain(engine, PICTURES[16], CAPTION, model) for model in engine.models)
    assert base != adapter and (shown(page, "Base"), shown(page, "Adapter")) == (base, adapter)
    partial = [text for text in dict.fromkeys(page.evaluate("window.seen")) if text and base.startswith(text)]
    assert len(partial) > 2  # it streamed
    assert "".join(page.locator("#answers section mark").all_inner_texts()) == "green house"
    assert page.locator("#answers section u").all_inner_texts() == ["house"]  # it is not there
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/host.png")
    ask(page, "Is there a house in this image?")
    finished(page, turns=2)
    assert shown(page, "Adapter") in ("Yes", "No") and shown(page, "Adapter", 1) == adapter  # the newest is first
    page.get_by_role("button", name="Clear the answers").click()
    expect(page.locator("#answers article")).to_have_count(0)


def test_a_follow_up_sees_the_conversation_about_its_picture_alone(engine, open_page, monkeypatch):  # noqa: F811
    conversations, stream = [], engine.stream

    def note(model, image, turns, *rest):
        conversations.append((model, [question for question, _ in turns]))
        return stream(model, image, turns, *rest)

    monkeypatch.setattr(engine, "stream", note)
    page = open_page()
    page.get_by_text("Settings").click()
    page.get_by_label("Follow-up questions see the conversation").check()
    page.get_by_label("Ask Base about the named objects").uncheck()
    example(page, 0)
    for number, question in enumerate(["One?", "Two?", "Three?"]):
        if number == 2:
            before = page.locator("#picture img").get_attribute("src")
            example(page, 1)
            expect(page.locator("#picture img")).not_to_have_attribute("src", before)
        ask(page, question)
        finished(page, turns=number + 1)
    assert [questions for model, questions in conversations if model == "Base"] == [
        ["One?"],
        ["One?", "Two?"],
        ["Three?"],
    ]
    thumbnails = page.locator("#answers h3 img").evaluate_all("images => images.map(image => image.src)")
    assert thumbnails[0] != thumbnails[1] == thumbnails[2]  # each answer says which picture it is about


def test_stop_a_new_picture_and_leaving_end_the_generation(endless, open_page):  # noqa: F811
    def begin(page, turns):
        ask(page, CAPTION)
        expect(page.locator("#answers article")).to_have_count(turns)
        expect(page.locator("#answers section[aria-label=Base] p").first).to_contain_text("The image")
        return list(endless.batch)

    page = open_page()
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Longest answer").fill("900")
    page.get_by_label("number input for Longest answer").blur()
    example(page, 0)
    for turn, end in enumerate((
        lambda: page.get_by_role("button", name="Stop", exact=True).click(),
        lambda: page.locator("#examples .gallery-item").nth(1).click(),
        lambda: page.close(),
    )):  # fmt: skip
        jobs = begin(page, turn + 1)
        end()
        rest(endless)
        assert len(jobs) == 2 and all(0 < len(job.tokens) < 600 for job in jobs)
        if not page.is_closed():
            finished(page, turn + 1)
            assert "The image" in shown(page, "Base")  # what came of it stays


def test_bad_input_gets_a_sentence_and_the_page_goes_on(open_page):
    page = open_page()
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".toast-body").last).to_contain_text("Choose a picture first")
    for name in ("text", "svg", "html", "cut off", "bomb"):
        give(page, ("a.png", REFUSED[name][0]))
        expect(page.locator(".toast-body").filter(has_text=REFUSED[name][1]).first).to_be_visible()
        expect(page.locator("#picture img")).to_have_count(0)
        for close in page.locator(".toast-close").all()[::-1]:
            close.click()
    example(page, 0)
    evil = "<img src=x onerror=alert(1)> <script>alert(2)</script> ${alert(3)} {{value}} </s> <image> **cup**?"
    ask(page, evil)
    finished(page)
    assert page.locator("#answers h3 span").inner_text() == evil
    assert page.locator("#answers script, #answers section img").count() == 0
    page.get_by_text("Settings").click()
    page.get_by_role("checkbox", name="Adapter", exact=True).uncheck()
    ask(page, CAPTION)
    finished(page, turns=2)
    assert page.locator("#answers article").first.locator("section").count() == 1  # one model, if one is wanted


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_the_answers_are_in_sight(open_page, theme):
    page = open_page(390, 844, theme)
    example(page, 0)
    page.evaluate("window.scrollTo(0, 0)")
    ask(page, CAPTION)
    finished(page)
    expect(page.locator("#answers section u")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing to scroll sideways
    base, adapter = (
        page.locator(f"#answers section[aria-label={name}] p").bounding_box() for name in ("Base", "Adapter")
    )
    assert adapter["y"] > base["y"] + base["height"] and adapter["y"] + adapter["height"] < 844
    colour, background = page.locator("#answers section mark").first.evaluate(
        "mark => [getComputedStyle(mark).color, getComputedStyle(mark).backgroundColor]"
    )
    light, dark = (sum(map(int, value[4:-1].split(","))) for value in (background, colour))
    assert abs(light - dark) > 300  # the marked words can be read
    if SCREENSHOTS and theme == "light":
        page.screenshot(path=f"{SCREENSHOTS}/host_phone.png")
