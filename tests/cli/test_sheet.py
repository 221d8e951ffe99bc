"""The page of ranked hits, opened in a browser."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from fam_plugins.cli.sheet import contact_sheet

EVIL = "<img src=x onerror=alert(1)>.jpg"


def png(colour="red"):
    file = BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, "PNG")
    return file.getvalue()


def sheet():
    hits = [("cat.jpg", 0.91, png()), ('a "b" & c.jpg', 0.5, png("blue")), (EVIL, -0.25, png())]
    return contact_sheet([(EVIL, hits), ("other.jpg", hits[:2])], "a model & <its> rule")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_names_are_text_and_make_no_elements():
    page = Tags(sheet())
    assert all("onerror" not in attributes for _, attributes in page.found)
    assert EVIL in page.text
    assert "a model & <its> rule" in page.text
    alts = [attributes["alt"] for tag, attributes in page.found if tag == "img"]
    assert len(alts) == 5
    assert alts[0] == f"hit 1. cat.jpg, score 0.910, for the query {EVIL}"
    assert alts[1] == f'hit 2. a "b" & c.jpg, score 0.500, for the query {EVIL}'
    assert alts[2] == f"hit 3. {EVIL}, score -0.250, for the query {EVIL}"


def test_nothing_is_fetched_from_elsewhere():
    sources = [a.get("src", a.get("href", "data:")) for _, a in Tags(sheet()).found]
    assert all(source.startswith("data:") for source in sources)
    policy = next(a["content"] for tag, a in Tags(sheet()).found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("no browser: pip install playwright, and Chromium from the system's packages")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    program = program or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser: install Chromium from the system's packages")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, tmp_path):
    file = tmp_path / "index.html"
    file.write_text(sheet(), encoding="utf-8")
    page = browser.new_page(color_scheme="dark")
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(file.as_uri())
    yield page
    page.close()


def focused(page):
    return page.evaluate("[...document.querySelectorAll('figure')].indexOf(document.activeElement)")


def test_a_browser_shows_every_picture_and_asks_for_nothing_else(page):
    assert page.evaluate("[...document.images].map((i) => i.naturalWidth)") == [12] * 5
    assert [url for url in page.asked if not url.startswith("data:")] == page.asked[:1]
    assert page.said == []  # no script of a file's name ran, and the policy refused nothing of ours
    assert page.title() == "Ranked hits"
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0


def test_keys_move_between_hits_and_stop_at_the_ends(page):
    assert focused(page) == -1
    for key, place in [
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("ArrowLeft", 0),
        ("End", 4),
        ("ArrowDown", 4),
        ("Home", 0),
        ("ArrowUp", 0),
        ("ArrowDown", 1),
    ]:
        page.keyboard.press(key)
        assert focused(page) == place
    page.keyboard.press("Tab")
    assert focused(page) == 2


def test_the_hit_with_the_focus_is_seen_in_the_dark_too(page):
    page.keyboard.press("End")
    style = "getComputedStyle(document.activeElement)"
    assert page.evaluate(f"{style}.outlineWidth") == "4px"
    page.emulate_media(color_scheme="dark")
    colours = page.evaluate(
        "(() => { const c = getComputedStyle(document.documentElement);"
        "return [c.color, getComputedStyle(document.activeElement).outlineColor] })()"
    )
    light = [sum(map(int, c[4:-1].split(","))) for c in colours]
    assert min(light) > 380  # light text and a light frame, on the browser's dark ground


def test_keys_of_the_browser_stay_its_own(page):
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Alt+Home")
    page.keyboard.press("Control+End")
    assert focused(page) == 0
