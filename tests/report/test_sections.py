"""The sections of the page, from made-up folders: exact values in the cells, errors named, differences condensed, safe markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.folders import lines, run_folder

from mllm_fl.report import build, context, plots, results
from mllm_fl.report.costs import costs
from mllm_fl.report.document import page
from mllm_fl.report.html import Cell, escape, table, tag
from mllm_fl.report.measures import measures
from mllm_fl.report.reading import read
from mllm_fl.report.table import Value
from mllm_fl.report.timeline import states, timeline

HOSTILE = (
    "<script>alert('x')</script>",
    '"><img src=x onerror=alert(1)>',
    '$x^2$ & #010203 d="1.23456"',
    "שלום\u202eabc",
    "long " * 40,
)


class Outline(HTMLParser):
    """Whether elements are closed in order, and what the page's elements say to a screen reader."""

    VOID = frozenset(("meta", "img", "br", "col", "link"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.unnamed: list[str] = []
        self.headings: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img" and not given.get("alt"):
            self.unnamed.append(str(given))
        if tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden")):
            self.unnamed.append(str(given))
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        assert not any(name.startswith("on") for name in given), given
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_of_hostile_names_is_whole_and_named(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, f"{HOSTILE[0]} {s}", stages=(bool(s), True), names=HOSTILE) for s in (0, 1)]
    text = page(read(folders), HOSTILE[1], None)
    outline = Outline(text)
    assert outline.open == [] and outline.unnamed == [] and outline.scripts == 1
    assert outline.headings[0] == "h1" and set(outline.headings[1:]) == {"h2"}
    assert "\u202e" not in text
    assert (
        "alert(&#x27;x&#x27;)" in text and ">$x^2$ &amp; #…</text>" in text
    )  # a class's name is neither mathematics nor a colour


def test_only_our_script_may_run(tmp_path: Path) -> None:
    text = page(read([run_folder(tmp_path)]), "t", None)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_cells_hold_the_exact_value_and_show_the_rounded_one(tmp_path: Path) -> None:
    found = read([run_folder(tmp_path, seed=s, accuracy=a) for s, a in ((0, 0.5004), (1, 0.6004))])
    text = results.comparison(found)
    mean, sd = (0.5004 + 0.6004) / 2, 0.1 / 2**0.5
    cells = re.findall(r'data-value="([\d.]+)" data-sd="([\d.]+)">([^<]*)<', text)
    value, deviation, shown = cells[0]
    assert [float(value), float(deviation)] == pytest.approx([mean, sd]) and shown == "55.0 ± 7.1"
    assert "max, selected on test" in text and "mean last 20 rounds" in text


def test_what_alignment_did_in_the_last_round(tmp_path: Path) -> None:
    found = read([run_folder(tmp_path, "a", s, accuracy=0.5 + s / 10, stages=(False, True)) for s in (0, 1)])
    text = results.comparison(found)
    assert (
        "30 of glyphs" in text and ">45.0 ± 7.1<" in text and ">55.0 ± 7.1<" in text and ">+10.0 ± 0.0 points<" in text
    )


def test_the_confusion_of_an_arm_is_the_sum_over_its_seeds(tmp_path: Path) -> None:
    one, two = [[9, 1, 0], [0, 5, 5], [0, 0, 1]], [[9, 1, 0], [0, 9, 1], [0, 0, 1]]
    folders = []
    for seed, confusion in enumerate((one, two)):
        folders.append(run_folder(tmp_path, seed=seed))
        final = json.loads((folders[-1] / "final.json").read_text())
        final["last"]["confusion"] = confusion
        (folders[-1] / "final.json").write_text(json.dumps(final))
    text = results.confusions(read(folders))
    assert "81.0 % right; most often one taken for two (6)" in text  # 34 of 42
    assert {"90", "70", "30", "100"} <= set(re.findall(r">(\d+)</text>", text))  # percent of the rows


def test_who_holds_what_is_written_as_numbers_too(tmp_path: Path) -> None:
    text = context.holdings(read([run_folder(tmp_path), run_folder(tmp_path, seed=1)]))
    assert text.count("<svg") == 1  # one federation, however many runs
    assert "6 images of made up on 2 clients, 2 to 4 each" in text
    assert re.search(r"client 1</th>(<td[^>]*>[011]</td>){3}<td[^>]*>2</td>", text)


def test_of_many_federations_a_few_are_drawn_and_the_rest_is_said(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, seed=s) for s in range(8)]
    for seed, folder in enumerate(folders):
        (folder / "federation.json").write_text(json.dumps({"clients": [{"histogram": [1, 1, seed]}]}))
    text = context.holdings(read(folders))
    assert text.count("<svg") == 6 and "2 more federations among the runs are not shown" in text


def test_rejected_updates_and_interruptions_are_listed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    bad = {"round": 2, "client": 1, "status": "rejected", "reason": "backbone.w has NaN <i>", "bytes_up": 1}
    lines(folder / "clients.jsonl", [{"round": 1, "client": 0, "status": "ok"}] * 3 + [bad] * 41)
    lines(folder / "events.jsonl", [{"event": "resumed"}, {"event": "resumed"}, {"event": "finished"}])
    text = timeline(read([folder]))
    assert "41 of 44 client updates were rejected" in text and "1 more are in" in text
    assert "NaN &lt;i&gt;" in text and "resumed ×2" in text
    assert "None of the 8 client updates" in timeline(read([run_folder(tmp_path, seed=1)]))


def test_a_stage_that_is_off_is_one_difference_not_one_for_each_key(tmp_path: Path) -> None:
    text = context.differences(read([run_folder(tmp_path, "a"), run_folder(tmp_path, "b", stages=(True, False))]))
    assert re.findall(r"<code>(.*?)</code>", text) == ["[pretrain]"]
    same = context.differences(read([run_folder(tmp_path, "a"), run_folder(tmp_path, "c", seed=0)]))
    assert "Nothing but names and seeds" in same


def test_reproduction_says_when_the_code_was_not_one_committed_state(tmp_path: Path) -> None:
    dirty = {"commit": "abc123-dirty"}
    text = context.reproduce(read([run_folder(tmp_path), run_folder(tmp_path, seed=1, environment=dirty)]))
    assert "2 different states of the code" in text and "not committed" in text
    assert "config.toml --runs NEW" in text and "mllm-fl run made-up.toml" in text
    assert "different states" not in context.reproduce(read([run_folder(tmp_path, seed=2)]))


def test_bytes_are_shown_in_units(tmp_path: Path) -> None:
    text = costs(read([run_folder(tmp_path, bytes_up=84_184_320)]))
    assert ">84.2 MB<" in text and ">8.0 kB<" in text and ">1.0 kB<" in text  # up, down, one client's update


def test_curves_over_seeds_take_the_rounds_that_all_have() -> None:
    line = plots.over_seeds(0, [[(1, 0.1), (2, 0.2)], [(2, 0.4), (3, 0.5)]])
    assert line is not None and list(line.rounds) == [2]
    assert line.values[0].mean == pytest.approx(0.3) and line.values[0].sd == pytest.approx(0.2 / 2**0.5)
    assert plots.over_seeds(0, [[(1, 0.1)], [(2, 0.1)]]) is None and plots.over_seeds(0, []) is None


def test_figures_take_the_page_s_colours_and_share_no_ids() -> None:
    line = plots.Line(1, [1, 2], [Value(0.1, 0.02), Value(0.2, 0.02)])
    a, b = (plots.curves(key, [line], "label", unit="u") for key in ("a", "b"))
    assert "var(--s1)" in a and "var(--soft)" in a and "#0" not in re.sub(r"url\(#[^)]*\)|href=\"#[^\"]*\"", "", a)
    ids = re.findall(r' id="([^"]+)"', a + b)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', a + b)) == set(ids)


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<b>", tag("i", "&"), title='"', hidden=True, id=None) == (
        '<p title="&quot;" hidden>&lt;b&gt;<i>&amp;</i></p>'
    )
    assert escape("a\nb") == "a b"
    assert '<td class="n">–</td>' in table("c", ["a", "b"], [["x", None]])
    assert '<th scope="col" class="n">b</th>' in table("c", ["a", "b"], [["x", Cell("1", 1.0)]])


def test_rounds_show_who_was_rejected_and_who_never_answered(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, rounds=2)
    lines(folder / "rounds.jsonl", [{"round": t, "clients": [0, 1]} for t in (1, 2)])
    row = {"client": 0, "status": "ok", "reason": None, "bytes_up": 1}
    lines(
        folder / "clients.jsonl",
        [row | {"round": 1}, row | {"round": 1, "client": 1, "status": "rejected"}, row | {"round": 2}],
    )
    (run,) = read([folder]).runs
    assert states(run) == [["averaged", "averaged"], ["rejected", "no answer"]]
    text = timeline(read([folder, run_folder(tmp_path, seed=1)]))
    assert "4 online: 2 averaged, 1 rejected, 1 no answer" in text and text.count('<svg class="plot"') == 1


def test_rounds_that_are_alike_are_drawn_once(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, seed=s) for s in range(3)]
    for folder in folders:
        lines(folder / "rounds.jsonl", [{"round": t, "clients": [0, 1]} for t in range(1, 5)])
    text = timeline(read(folders))
    assert text.count('<svg class="plot"') == 1 and "2 more runs had exactly such rounds" in text


OVERHEAD = {
    "flop": {"pretrain": 5e12, "clients": 2_500_000, "server": 0, "align": None, "evaluate": 10}, "flop_rule": "counted once",
    "per_visit": {"visits": 8, "seconds": 0.05, "flop": 312_500.0, "bytes_up": 1000.0, "bytes_down": 900.0},
    "joules": {"cpu": 1500.0, "gpu": None}, "peak_bytes": {"process": 5e8, "workers": None, "gpu": None},
    "annotation": {"model": "m<i>", "questions": 7, "answers": 6, "failed": 1, "prompt_tokens": 1234.0, "completion_tokens": 5.0, "seconds": 9.0},
}  # fmt: skip


def test_costs_are_measured_or_said_not_to_be(tmp_path: Path) -> None:
    text = costs(read([run_folder(tmp_path, overhead=OVERHEAD, stages=(True, True))]))
    assert ">5.0 TFLOP<" in text and ">2.5 MFLOP<" in text and ">312 kFLOP<" in text and ">not measured<" in text
    assert ">1.5 kJ<" in text and ">0.050<" in text and "m&lt;i&gt;" in text and ">1,234<" in text
    assert (
        "Not measured, because the machine does not tell or there is none: peak memory, workers, peak memory, GPU, energy, GPUs."
        in text
    )
    assert "FLOP" not in costs(read([run_folder(tmp_path, seed=1)]))  # an older run says nothing of them


def test_other_measures_and_each_client(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "per_client": {"mean": 0.5, "worst_decile": 0.25, "each": [0.75, None]},
        "forgetting": {"mean": 0.125, "per_class": [0]},
    }
    text = measures(read([run_folder(tmp_path, **more)]))
    assert all(f">{shown}<" in text for shown in ("50.0", "25.0", "12.5", "75.0"))
    assert 'client 1</th><td class="n">–</td>' in text and "The round chosen" not in text
    chosen = {"accuracy": 0.375, "validation": 0.4, "round": 7, "source": "leftover", "images": 90}
    assert ">37.5<" in measures(read([run_folder(tmp_path, seed=1, chosen=chosen)]))


def test_images_that_were_dealt_to_the_clients_are_no_alignment(tmp_path: Path) -> None:
    """The control ``clients`` has a D_align and no stage 3: it stands in the comparison, not among what alignment did."""
    dealt = {"source": "glyphs", "images": 30, "in_domain": False, "control": "clients"}
    folders = [run_folder(tmp_path, "dealt", align=dealt), run_folder(tmp_path, "aligned", stages=(False, True))]
    text = build(folders, tmp_path / "r.html").read_text(encoding="utf-8")
    did = text.split("What the alignment of the last round did")[2].split("</table>")[0]
    assert (
        "aligned" in did and "dealt" not in did and "30 images of glyphs (not in-domain), dealt to the clients" in text
    )
