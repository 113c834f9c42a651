"""The page in a real browser: nothing in the console, no request, numbers equal to the records, sortable, copyable, by keyboard, dark, narrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.report.chromium import Chromium
from tests.report.folders import run_folder

from mllm_fl.report import build
from mllm_fl.report.table import plain

HOSTILE = (
    "<script>alert('x')</script>",
    '"><img src="http://example.invalid/x.png" onerror=alert(1)>',
    "שלום\u202eabc </svg><style>*{display:none}</style>",
    "x" * 200,
)
ACCURACY = {"plain": (0.41234, 0.45678), "aligned": (0.61234, 0.60004), HOSTILE[0]: (0.5, 0.51)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of two seeds on hostile classes; one run has costs and a rejected update."""
    root = tmp_path_factory.mktemp("browser")
    folders = []
    for arm, values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            stages = (False, arm == "aligned")
            folders.append(run_folder(root, arm, seed, accuracy=accuracy, names=HOSTILE, stages=stages, rounds=12))
    bad = {"round": 2, "client": 1, "status": "rejected", "reason": HOSTILE[1], "bytes_up": 1}
    with open(folders[0] / "clients.jsonl", "a") as f:
        f.write(json.dumps(bad) + "\n")
    return build(folders, root / "report.html", title=HOSTILE[0])


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as found:
        yield found


@pytest.fixture
def shown(browser: Chromium, page: Path) -> Chromium:
    """The page, freshly loaded, wide and light."""
    browser.said.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.open(page)
    return browser


def row(browser: Chromium, arm: str) -> list[dict[str, str | None]]:
    """The cells of an arm's row in the comparison."""
    found = browser.value(f"""[...document.querySelectorAll("#comparison ~ .scroll tbody tr")].find(
        (r) => r.cells[0].textContent === {json.dumps(plain(arm))})?.cells.length && [...[...document.querySelectorAll(
        "#comparison ~ .scroll tbody tr")].find((r) => r.cells[0].textContent === {json.dumps(plain(arm))}).cells].map(
        (c) => ({{text: c.innerText, value: c.dataset.value ?? null}}))""")
    assert isinstance(found, list)
    return found


def test_the_console_is_silent_and_nothing_is_asked_for(shown: Chromium, page: Path) -> None:
    shown.value("new Promise((done) => setTimeout(done, 300))")
    assert shown.said == []
    assert [url for url in shown.requests if not url.startswith("data:image/")] == [page.resolve().as_uri()]
    assert shown.value("document.scripts.length") == 1
    blocked = shown.value("fetch('http://127.0.0.1:9/').then(() => 'left', () => 'held')")
    assert blocked == "held"  # by the page's own policy, before a connection is tried
    assert any("Content Security Policy" in line for line in shown.said)


def test_what_is_read_equals_the_records(shown: Chromium) -> None:
    for arm, values in ACCURACY.items():
        cells = row(shown, arm)
        mean = sum(values) / 2
        sd = abs(values[0] - values[1]) / 2**0.5
        assert cells[1]["text"] == "2"
        assert cells[2]["text"] == f"{100 * mean:.1f} ± {100 * sd:.1f}"
        assert float(str(cells[2]["value"])) == pytest.approx(mean, abs=1e-15)


def test_hostile_names_are_shown_as_they_are(shown: Chromium) -> None:
    text = shown.value("document.body.innerText")
    assert HOSTILE[0] in text and HOSTILE[1] in text and HOSTILE[3] in text
    assert "\u202e" not in text and "\N{REPLACEMENT CHARACTER}" in text
    assert shown.value("document.title") == HOSTILE[0]
    assert shown.value("getComputedStyle(document.querySelector('main')).display") == "block"


def test_tables_sort_by_keyboard_and_say_so(shown: Chromium) -> None:
    head = "document.querySelector('#comparison ~ .scroll thead').rows[0].cells"
    order = "[...document.querySelectorAll('#comparison ~ .scroll tbody')][0].rows"
    arms = f"[...{order}].map((r) => r.cells[0].textContent)"
    shown.value(f"{head}[2].querySelector('button').focus()")
    shown.press("Enter")
    assert shown.value(f"{head}[2].getAttribute('aria-sort')") == "descending"
    assert shown.value(arms) == ["aligned", HOSTILE[0], "plain"]
    shown.press(" ")
    assert shown.value(f"{head}[2].getAttribute('aria-sort')") == "ascending"
    assert shown.value(arms) == ["plain", HOSTILE[0], "aligned"]


def test_tables_are_copied_with_their_exact_values(shown: Chromium) -> None:
    shown.value("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    for label in ("CSV", "LaTeX"):
        shown.value(f"""[...document.querySelectorAll('#comparison ~ .copy button')].find(
            (b) => b.textContent === 'Copy as {label}').click()""")
        copied = shown.value("window.copied")
        if label == "CSV":
            line = next(x for x in csv.reader(copied.splitlines()) if x[0] == "plain")
            expected = [2, sum(ACCURACY["plain"]) / 2, (0.45678 - 0.41234) / 2**0.5]
            assert [float(x) for x in line[1:4]] == pytest.approx(expected)
        else:
            assert r"plain & 2 & 43.5 $\pm$ 3.1" in copied and r"\begin{tabular}" in copied


def test_the_first_key_skips_to_the_comparison_and_every_table_is_within_reach(shown: Chromium) -> None:
    shown.press("Tab")
    assert shown.value("document.activeElement.textContent") == "To the comparison"
    shown.press("Enter")
    assert shown.value("location.hash") == "#comparison"
    assert shown.value(
        "[...document.querySelectorAll('.scroll')].every((s) => s.tabIndex === 0 && s.getAttribute('aria-label'))"
    )
    named = "(e) => (e.getAttribute('aria-label') || e.textContent).trim()"
    assert shown.value(f"[...document.querySelectorAll('button, summary, a')].every({named})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(shown: Chromium, scheme: str) -> None:
    shown.prefer(scheme)
    ratios = shown.value("""(() => {
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return ['p.lead', '.note', 'a', 'td', 'figcaption', 'svg.plot text'].map((s) => {
            const e = document.querySelector(s), style = getComputedStyle(e);
            const ink = light(s.startsWith('svg') ? style.fill : style.color);
            return [s, (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)] }) })()""")
    assert all(ratio >= 4.5 for _, ratio in ratios), ratios
    assert (shown.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )


@pytest.mark.parametrize("width", [400, 320])
def test_a_telephone_scrolls_one_way_only(shown: Chromium, width: int) -> None:
    shown.resize(width, 800)
    assert shown.value("document.documentElement.scrollWidth") <= width
    too_wide = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert shown.value(too_wide) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_names_of_two_hundred_characters_stay_in_their_cells(browser: Chromium, tmp_path: Path, width: int) -> None:
    """Also where an arm's name heads a column, among what differs between the arms; an alignment image's source too."""
    long = {"source": "z" * 200 + HOSTILE[0], "images": 30, "in_domain": False}
    arms = {"plain": {}, "y" * 200: {"stages": (False, True), "align": long}}
    folders = [run_folder(tmp_path, arm, names=HOSTILE, **more) for arm, more in arms.items()]  # type: ignore[arg-type]
    browser.resize(width, 900)
    browser.open(build(folders, tmp_path / "report.html", title="long"))
    outside = """[...document.querySelectorAll('th button, td bdi, th bdi')].filter((e) =>
        e.getBoundingClientRect().right > e.closest('th, td').getBoundingClientRect().right + 1).map((e) => e.outerHTML)"""
    assert browser.value(outside) == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert "z" * 200 + HOSTILE[0] + " (not in-domain)" in str(browser.value("document.body.innerText"))


def test_on_paper_there_are_no_buttons_and_no_scrolling(shown: Chromium) -> None:
    shown.prefer("dark", "print")
    assert shown.value(
        "[...document.querySelectorAll('nav, .copy')].every((e) => getComputedStyle(e).display === 'none')"
    )
    assert shown.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown.prefer("light")


def test_many_runs_stay_a_page(tmp_path: Path) -> None:
    """Thirty runs of sixty rounds: the size that a hundred of two hundred keep below 10 MB (scripts/report_size.py)."""
    folders = [run_folder(tmp_path, f"arm {i}", s, rounds=60) for i in range(15) for s in range(2)]
    assert build(folders, tmp_path / "r.html").stat().st_size < 1_500_000
