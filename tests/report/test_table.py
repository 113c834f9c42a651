"""The comparison table: hand-checkable means, honest gaps, hostile names, and a README that follows the results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.report.table import alignment_notes, compare, footnotes, to_markdown, to_text

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "readme_table.py"


def final(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """The part of final.json that the table reads."""
    return {
        "experiment": "e", "name": f"{arm}-{seed}", "arm": arm, "seed": seed, "config_hash": f"{arm}{seed}",
        "last": {"accuracy": accuracy, "many": accuracy, "medium": accuracy, "few": None},
        "mean_last": {"rounds": 20, "n": 20, "mean": accuracy, "sd": 0.01}, "max": {"accuracy": accuracy}, "ema": {"accuracy": accuracy}, **more,
    }  # fmt: skip


def test_seeds_become_mean_and_sample_deviation() -> None:
    (row,) = compare([final("a", 0, 0.5), final("a", 1, 0.6), final("a", 2, 0.7)])
    assert row.seeds == (0, 1, 2)
    last = row.values["last"]
    assert last is not None and last.sd is not None
    assert (round(last.mean, 9), round(last.sd, 9)) == (0.6, 0.1)


def test_what_is_missing_is_a_dash_and_never_a_number() -> None:
    (row,) = compare([final("a", 0, 0.5), final("a", 1, 0.6, ema=None)])
    assert row.values["ema"] is None and row.values["few"] is None and row.values["seconds"] is None
    assert (
        to_markdown([row]).splitlines()[2]
        == "| a | 2 | 55.0 ± 7.1 | 55.0 ± 7.1 | – | 55.0 ± 7.1 | 55.0 ± 7.1 | 55.0 ± 7.1 | – |"
    )
    assert compare([{"arm": "x", "last": {"accuracy": float("nan")}}])[0].values["last"] is None
    assert compare([{"arm": "x", "last": {"accuracy": True}}])[0].values["last"] is None


def test_one_seed_carries_the_deviation_over_its_rounds_and_says_so() -> None:
    rows = compare([final("a", 0, 0.5)])
    assert "50.0±1.0" in to_text(rows)
    assert to_text(rows).split()[:4] == ["arm", "seeds", "last", "mean20"]
    other = final("b", 0, 0.5, mean_last={"rounds": 10, "mean": 0.5})
    assert to_text(compare([final("a", 0, 0.5), other])).split()[:4] == ["arm", "seeds", "last", "mean"]
    assert "One seed" in footnotes(rows)[1]
    assert "2 seeds" in footnotes(compare([final("a", 0, 0.5), final("a", 1, 0.6)]))[1]
    assert all("selected on test" in notes[-1] for notes in (footnotes(rows), footnotes([])))


def test_a_run_that_was_aligned_once_is_named_where_the_columns_are_of_two_models() -> None:
    rows = compare([final("plain", 0, 0.5, curve="plain"), final("once", 0, 0.5, curve="unaligned")])
    (said,) = [n for n in footnotes(rows) if n.startswith("Aligned once")]
    assert "(once): last and the groups are the aligned model's, the mean over rounds, EMA and max those of the" in said
    assert said in to_markdown(rows)
    assert not any("Aligned once" in n for n in footnotes(rows[:1]))


def test_equal_arm_and_seed_are_not_two_seeds() -> None:
    same, other = final("a", 0, 0.5), final("a", 0, 0.7, config_hash="other")
    assert [r.seeds for r in compare([same, same])] == [(0,)]
    assert [r.arm for r in compare([same, other])] == ["a [a0]", "a [other]"]
    elsewhere = final("a", 1, 0.7, experiment="f")
    assert [r.arm for r in compare([same, elsewhere])] == ["e: a", "f: a"]


@pytest.mark.parametrize("arm", ["fedavg", "long " * 40, "\x1b[31mred", "evil\u202egnp", "宽" * 30])
def test_a_terminal_of_80_columns_holds_it(arm: str) -> None:
    text = to_text(compare([final(arm, s, 0.5 + s / 10) for s in range(3)] + [final("b", 0, 0.5)]))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "\u202e" not in text


def test_markdown_escapes_names() -> None:
    line = to_markdown(compare([final("a|b <script> [x](http://y) *z*\n", 0, 0.5)])).splitlines()[2]
    assert line.startswith("| a\\|b \\<script\\> \\[x\\]\\(http://y\\) \\*z\\*\N{REPLACEMENT CHARACTER} | 1 |")


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(SCRIPT),
        "--readme",
        str(folder / "README.md"),
        "--results",
        str(folder / "quickstart.jsonl"),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_follows_the_results(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- quickstart-table -->\nold\n<!-- /quickstart-table -->\nafter\n")
    (tmp_path / "quickstart.jsonl").write_text("".join(json.dumps(final("fedavg", s, 0.5)) + "\n" for s in (0, 1)))
    stale = script(tmp_path, "--check")
    assert (stale.returncode, "is stale" in stale.stderr, "old" in readme.read_text()) == (1, True, True)
    assert script(tmp_path).returncode == 0
    text = readme.read_text()
    assert "| fedavg | 2 | 50.0 ± 0.0 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("-->\nafter\n")
    assert script(tmp_path, "--check").returncode == 0


def test_a_readme_without_marks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    (tmp_path / "quickstart.jsonl").write_text(json.dumps(final("fedavg", 0, 0.5)) + "\n")
    done = script(tmp_path)
    assert done.returncode == 2 and "README.md: needs <!-- quickstart-table --> once" in done.stderr
    (tmp_path / "quickstart.jsonl").unlink()
    assert "no such results file" in script(tmp_path).stderr


@pytest.mark.parametrize(
    ("page", "results"),
    [
        ("README.md", "quickstart"), ("docs/alignment.md", "alignment"), ("docs/alignment.md", "alignment_r"),
        ("docs/alignment.md", "alignment_r_end"), ("docs/engines.md", "precision_r"), ("docs/pretraining.md", "handover"),
    ],
)  # fmt: skip
def test_every_table_of_runs_is_that_of_its_results(page: str, results: str) -> None:
    """What scripts/readme_table.py would write stands there already."""
    root = SCRIPT.parents[1]
    words = ["--check", "--readme", str(root / page), "--results", str(root / f"results/{results}.jsonl")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_table_says_on_what_images_stage_3_worked() -> None:
    """Size, source, in-domain or not, the control; a record that says no domain is known by its source's name, or not at all."""

    def made(arm: str, seed: int = 0, **align: Any) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "last": {"accuracy": 0.5}, "align": align or None}

    glyphs: dict[str, Any] = {"source": "glyphs", "images": 200, "in_domain": False}
    rows = compare([
        made("plain"), made("aligned", **glyphs), made("aligned", 1, **glyphs), made("ce", **glyphs, control="ce"),
        made("alone", **glyphs, control="alone"), made("clients", **glyphs, control="clients"),
        made("old", source="cifar10 leftover, 100 a class", images=1000), made("web", source="web", images=30, in_domain=None),
    ])  # fmt: skip
    notes = alignment_notes(rows)
    assert notes == [
        "Alignment images of aligned, ce: 200 images of glyphs (not in-domain).",
        "Alignment images of alone: 200 images of glyphs (not in-domain), and no client.",
        "Alignment images of clients: 200 images of glyphs (not in-domain), dealt to the clients.",
        "Alignment images of old: 1000 images of cifar10 leftover, 100 a class (in-domain).",
        "Alignment images of web: 30 images of web (in-domain: not said).",
    ]
    for text in (to_markdown(rows), " ".join(to_text(rows).split())):
        assert all(n in text for n in notes)
    hostile = compare([made("a\u202eb", source="x\u202e<script>", images=1, in_domain=True)])
    assert alignment_notes(hostile) == ["Alignment images of a\ufffdb: 1 images of x\ufffd<script> (in-domain)."]
    assert "x\ufffd\\<script\\>" in to_markdown(hostile)
