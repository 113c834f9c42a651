"""The review page in a real browser: driven by keyboard, hostile texts stay texts, every decision is on the disk, at 400 px too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.annotate.corpora import HOSTILE, corpus, record
from tests.report.chromium import WAIT, Chromium

from mllm_fl.annotate import review
from mllm_fl.annotate.review import Review
from mllm_fl.annotate.review_server import ReviewServer

RECORDS = [
    record(f"r{n}", f"images/{n}.png", text, "It is brown.", kind="conversation")
    for n, text in enumerate(("A dog.", *HOSTILE, "A cat."))
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium(1000, 800) as found:
        yield found


@pytest.fixture
def page(browser: Chromium, tmp_path: Path) -> Iterator[tuple[Chromium, ReviewServer]]:
    folder = corpus(tmp_path / f"corpus {HOSTILE[0].replace('/', '')}", RECORDS)
    (folder / "images/5.png").write_bytes(b"broken")
    with ReviewServer(Review(folder, RECORDS, 6), {"r1": {"clip": HOSTILE[1]}}, {"images/0.png": "a dog"}) as server:
        browser.said.clear()
        browser.requests.clear()
        browser.resize(1000, 800)
        browser.call("Page.navigate", url=server.url)
        until(
            lambda: browser.value("document.querySelector('#turns dd') !== null && document.readyState === 'complete'")
        )
        yield browser, server


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def key(browser: Chromium, name: str, ctrl: bool = False) -> None:
    code = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Escape": 27}.get(name) or ord(name.upper())
    more: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
    text = {"text": name} if len(name) == 1 and not ctrl else {}
    browser.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **more, **text)
    browser.call("Input.dispatchKeyEvent", type="keyUp", **more)


def at(browser: Chromium) -> int:
    return int(str(browser.value("document.getElementById('place').textContent")).split()[1])


def test_a_review_by_keyboard(page: tuple[Chromium, ReviewServer]) -> None:
    browser, server = page
    ids, folder = [r.id for r in server.review.sample], server.review.folder
    key(browser, "k")
    until(lambda: at(browser) == 2)
    assert review.read(folder)[ids[0]].decision == "keep"  # at once
    key(browser, "d")
    until(lambda: at(browser) == 3)
    key(browser, "r")
    until(lambda: browser.value("document.activeElement.tagName") == "TEXTAREA")
    browser.value("document.querySelectorAll('textarea')[0].value = 'A <b>bold</b> cat. keep drop'")
    key(browser, "Enter", ctrl=True)
    until(lambda: at(browser) == 4)
    assert review.read(folder)[ids[2]].answers == ("A <b>bold</b> cat. keep drop", "It is brown.")
    key(browser, "ArrowLeft")
    until(lambda: at(browser) == 3)
    assert browser.value("document.querySelector('#turns dd').textContent") == "A <b>bold</b> cat. keep drop"
    assert browser.value("document.getElementById('decision').textContent") == "Decided: relabel"
    key(browser, "u")
    until(lambda: browser.value("document.getElementById('decision').textContent") == "Not decided yet")
    assert set(review.read(folder)) == set(ids[:2])
    assert "error rate 50.0 % (1 of 2 records)" in str(browser.value("document.getElementById('estimate').textContent"))
    browser.value("document.getElementById('finish').click()")
    until(server.finished.is_set)
    until(lambda: "You can close this page" in str(browser.value("document.body.textContent")))


def test_letters_typed_into_an_answer_decide_nothing_and_escape_leaves(page: tuple[Chromium, ReviewServer]) -> None:
    browser, server = page
    key(browser, "r")
    until(lambda: browser.value("document.activeElement.tagName") == "TEXTAREA")
    for letter in "kdu":
        key(browser, letter)
    assert not server.review.decisions and str(browser.value("document.activeElement.value")).endswith("kdu")
    key(browser, "Escape")
    until(lambda: browser.value("document.querySelectorAll('textarea').length") == 0)
    assert at(browser) == 1


def test_an_empty_answer_is_refused_on_the_page(page: tuple[Chromium, ReviewServer]) -> None:
    browser, server = page
    key(browser, "r")
    until(lambda: browser.value("document.activeElement.tagName") == "TEXTAREA")
    browser.value("document.querySelectorAll('textarea')[1].value = ' '")
    browser.value("document.getElementById('save').click()")
    until(lambda: "has an empty answer" in str(browser.value("document.getElementById('problem').textContent")))
    assert not server.review.decisions and browser.value("document.querySelectorAll('textarea').length") == 2


def test_hostile_texts_stay_texts_and_nothing_else_is_asked_for(page: tuple[Chromium, ReviewServer]) -> None:
    browser, server = page
    seen = set()
    for n in range(6):
        until(lambda: at(browser) == n + 1)  # noqa: B023 - called at once
        said = str(browser.value("document.getElementById('turns').textContent"))
        seen.add(server.review.sample[n].id)
        if server.review.sample[n].id == "r1":
            assert HOSTILE[0] in said and HOSTILE[1] in str(browser.value("document.getElementById('why').textContent"))
        if server.review.sample[n].id == "r3":
            assert "\u202e" not in said and "\u200b" not in said and "a\ufffdb\ufffd" in said
        if server.review.sample[n].id == "r5":
            until(
                lambda: browser.value(
                    "!document.getElementById('missing').hidden && document.getElementById('picture').hidden"
                )
            )
        key(browser, "ArrowRight")
    assert seen == {r.id for r in RECORDS}
    assert browser.value("document.title") == "Review of a corpus"
    assert browser.value("document.querySelectorAll('#turns script, #turns img, #why img').length") == 0
    assert all(url.startswith((server.url, "data:")) for url in browser.requests), browser.requests
    assert [
        line for line in browser.said if "404" not in line
    ] == []  # the broken picture is not found, and nothing else is said


def test_at_400_pixels_everything_can_be_reached(page: tuple[Chromium, ReviewServer], tmp_path: Path) -> None:
    browser, server = page
    browser.resize(400, 800)
    place = next(n for n, r in enumerate(server.review.sample) if r.id == "r4")  # a word of 300 letters
    for _ in range(place):
        key(browser, "ArrowRight")
    until(lambda: at(browser) == place + 1)
    assert browser.value("document.documentElement.scrollWidth") <= 400
    boxes = json.loads(
        str(
            browser.value(
                "JSON.stringify([...document.querySelectorAll('nav button')].map((b) => b.getBoundingClientRect()))"
            )
        )
    )
    assert len(boxes) == 7
    assert all(b["left"] >= 0 and b["right"] <= 400 and b["bottom"] <= 800 and b["height"] >= 32 for b in boxes)
    bar = float(str(browser.value("document.querySelector('nav').getBoundingClientRect().top")))
    browser.value("window.scrollTo(0, document.body.scrollHeight)")
    assert (
        float(str(browser.value("document.getElementById('decision').getBoundingClientRect().bottom"))) <= bar
    )  # not hidden behind the buttons
    browser.shoot(tmp_path / "narrow.png", whole=False)
    assert (tmp_path / "narrow.png").stat().st_size > 1000
