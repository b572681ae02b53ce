"""A page in a browser: one picture, one question, two answers; stop, follow-ups, new pictures, a phone, darkness. The tests
are those of both pages: here over transformers, and in test_serving.py, which imports them, over vLLM."""

import os
import shutil
from types import SimpleNamespace

import pytest
from playwright.sync_api import Error, expect, sync_playwright
from test_host import PICTURES, REFUSED, endless, engine, plain, wait_until  # noqa: F401

import llava_gradio_lora_host as host

expect.set_options(timeout=30_000)  # both cores may be busy
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures of the pages in
CAPTION = "Describe this image."


@pytest.fixture(scope="module")
def site(engine):  # noqa: F811
    """A listening page: its address, its engine, what plain generation says, and how many answers grow now."""
    about = "<mark>Marked</mark> words are not in the other answer. <u>Underlined</u> objects are those that the base denies."
    page = host.build_page(engine, about, 900, False, 8, host.find_doubtful)
    host.launch_page(page)
    found = SimpleNamespace(name="host", address=page.local_url, engine=engine, growing=lambda: len(engine.jobs))
    found.answers = {model: plain(engine, PICTURES[16], CAPTION, model) for model in engine.models}
    yield found
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
def open_page(site, browser):
    """A function that opens the page, of a width in pixels, light or dark."""
    problems, context = [], browser.new_context()
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("dialog", lambda dialog: (problems.append("a script ran"), dialog.dismiss()))

    def open_one(width=1280, height=800, theme="light"):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{site.address}?__theme={theme}")
        expect(page.locator("#question textarea")).to_be_visible()
        return page

    yield open_one
    context.close()
    assert not problems


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def example(page, number):
    before = page.locator("#picture img").get_attribute("src") if page.locator("#picture img").count() else ""
    page.locator("#examples .gallery-item").nth(number).click()
    expect(page.locator("#picture img")).not_to_have_attribute("src", before)


def ask(page, question):
    page.locator("#question textarea").fill(question)
    button(page, "Ask").click()


def finished(page, turns=1):
    expect(page.locator("#answers article")).to_have_count(turns)  # begun
    expect(button(page, "Ask")).to_be_visible()


def shown(page, turn=0):
    return page.locator("#answers article").nth(turn).locator("p").all_inner_texts()


@pytest.mark.slow  # a mark of the module would not go with the tests into test_serving.py
def test_two_answers_stream_and_what_differs_is_marked(site, open_page):
    page = open_page()
    page.set_input_files("#picture input[type=file]", PICTURES[16])
    expect(page.locator("#picture img")).to_be_visible()
    page.evaluate("""() => { window.seen = []; const answers = document.querySelector('#answers');
        new MutationObserver(() => window.seen.push(answers.querySelector('p')?.innerText || ''))
            .observe(answers, {childList: true, subtree: true, characterData: true}) }""")
    button(page, "Ask").click()  # an empty question asks for a description
    finished(page)
    base, adapter = site.answers.values()
    assert base != adapter and shown(page) == [base, adapter]
    assert page.locator("#answers h4").all_inner_texts() == site.engine.models
    partial = [text for text in dict.fromkeys(page.evaluate("window.seen")) if text and base.startswith(text)]
    assert len(partial) > 2  # it streamed
    assert "".join(page.locator("#answers .differs").all_inner_texts()) == "green house"
    assert page.locator("#answers .doubtful").all_inner_texts() == ["house"] * (site.name == "host")  # it is not there
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{site.name}.png")
    ask(page, "Is there a house in this image?")
    finished(page, turns=2)
    assert shown(page)[1] in ("Yes", "No") and shown(page, 1) == [base, adapter]  # the newest is first
    button(page, "Clear the answers").click()
    expect(page.locator("#answers article")).to_have_count(0)


@pytest.mark.slow
def test_a_follow_up_sees_the_conversation_about_its_picture_alone(site, open_page, monkeypatch):
    conversations, stream = [], site.engine.stream

    def note(image, talks, *settings, **options):
        if settings:  # it is no question about an object
            conversations.append([question for question, _ in talks[site.engine.models[0]]])
        return stream(image, talks, *settings, **options)

    monkeypatch.setattr(site.engine, "stream", note)
    page = open_page()
    page.get_by_text("Settings").click()
    page.get_by_label("Follow-up questions see the conversation").check()
    example(page, 0)
    for turns, question in ((1, "One?"), (2, "Two?"), (1, "Three?")):
        if question == "Three?":
            example(page, 1)  # answers about another picture do not stay
            expect(page.locator("#answers article")).to_have_count(0)
        ask(page, question)
        finished(page, turns)
    assert conversations == [["One?"], ["One?", "Two?"], ["Three?"]]


@pytest.mark.slow
def test_stop_a_new_picture_and_leaving_end_the_generation(site, endless, open_page):  # noqa: F811
    page = open_page()
    page.get_by_text("Settings").click()
    page.get_by_label("number input for Longest answer").fill("900")
    page.get_by_label("number input for Longest answer").blur()
    example(page, 0)
    ends = {
        "stop": lambda: button(page, "Stop").click(),
        "new picture": lambda: page.locator("#examples .gallery-item").nth(1).click(),
        "leave": lambda: page.close(),
    }
    for name, end in ends.items():
        ask(page, CAPTION)
        expect(page.locator("#answers p").nth(1)).to_contain_text("The image")
        wait_until(lambda: site.growing() == 2)
        end()
        wait_until(lambda: not site.growing(), 2)  # far too soon for 900 tokens
        if name != "leave":
            expect(button(page, "Ask")).to_be_visible()
        if name == "stop":  # what came of it stays, unless it is about another picture
            assert len(shown(page)) == 2 and all("The image" in text for text in shown(page))
            button(page, "Clear the answers").click()
        if name != "leave":
            expect(page.locator("#answers article")).to_have_count(0)


@pytest.mark.slow
def test_bad_input_gets_a_sentence_and_the_page_goes_on(site, open_page):
    page = open_page()
    button(page, "Ask").click()
    expect(page.locator(".toast-body").last).to_contain_text("Choose a picture first")
    for name in ("text", "svg", "html", "cut off", "bomb"):
        file = {"name": "a.png", "mimeType": "image/png", "buffer": REFUSED[name][0]}
        page.set_input_files("#picture input[type=file]", file)
        expect(page.locator(".toast-body").filter(has_text=REFUSED[name][1]).first).to_be_visible()
        expect(page.locator("#picture img")).to_have_count(0)
        for close in page.locator(".toast-close").all()[::-1]:
            close.click()
    example(page, 0)
    evil = "<img src=x onerror=alert(1)> <script>alert(2)</script> ${alert(3)} {{value}} </s> <image> **cup**?"
    ask(page, evil)
    finished(page)
    assert page.locator("#answers h3").inner_text() == evil
    assert page.locator("#answers script, #answers img").count() == 0
    page.get_by_text("Settings").click()
    page.get_by_role("checkbox", name=site.engine.models[1], exact=True).uncheck()
    ask(page, CAPTION)
    finished(page, turns=2)
    assert len(shown(page)) == 1  # one model, if one is wanted


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_the_answers_are_in_sight(site, open_page, theme):
    page = open_page(390, 844, theme)
    example(page, 0)
    page.evaluate("window.scrollTo(0, 0)")
    ask(page, CAPTION)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing to scroll sideways
    base, adapter = (page.locator("#answers p").nth(number).bounding_box() for number in (0, 1))
    assert adapter["y"] > base["y"] + base["height"] and adapter["y"] + adapter["height"] < 844
    look = "mark => [getComputedStyle(mark).color, getComputedStyle(mark).backgroundColor]"
    colour, background = page.locator("#answers .differs").first.evaluate(look)
    light, dark = (sum(map(int, value[4:-1].split(","))) for value in (background, colour))
    assert abs(light - dark) > 300  # the marked words can be read
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{site.name}_phone{'_dark' * (theme == 'dark')}.png")
