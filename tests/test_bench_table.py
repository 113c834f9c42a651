"""docs/engines.md's tables: one line of a benchmark in words that can be checked by hand, and the page is not stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import bench_table

ROOT = Path(__file__).parents[1]
LINE: dict[str, Any] = {
    "benchmark": "engines and peers", "processor": "A chip", "torch": "2.13.0", "commit": "abc", "cores": 2,
    "load": {"clients": 8, "images": 600, "epochs": 1, "batch": 32, "width": 64, "repeats": 3},
    "seconds": {"bare": [4.0, 5.0, 6.0], "parallel fp32": [2.0, 3.0, 2.5]},
    "core_seconds": {"bare": [4.0, 5.0, 6.0], "parallel fp32": [4.0, 5.0, 6.0]},
    "wall_over_bare_shared": {"bare": 2.0, "parallel fp32": 1.0}, "over_bare_shared": {"bare": 1.0, "parallel fp32": 1.0},
    "overhead": {"share": 0.012}, "overhead_tiny": {"share": 0.08, "clients": 1000}, "startup_seconds": 1.5, "pss_bytes": 1.25e9,
    "gflops_a_core": {"fp32": 100.0}, "limit_seconds": {"fp32": 1.5}, "failed": {"pfl": "no wheel"},
}  # fmt: skip


def test_one_line_as_a_table() -> None:
    said = bench_table.table(LINE)
    assert "| parallel fp32 | 2.50 (2.00 to 3.00) | 5.00 (4.00 to 6.00) | 1.00 | 1.00 |" in said
    assert "8 clients of 600 images" in said and "A chip" in said and "commit `abc`" in said
    assert "1.2% of this round, 8.0% of a round of 1,000 clients" in said
    assert "| this chip's matrix products, fp32 (100 GFLOP/s a core) | 1.50 | | | |" in said
    assert "1.25 GB" in said and "pfl could not be measured: no wheel." in said


def test_the_last_line_of_equal_loads_counts(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    other = LINE | {"load": LINE["load"] | {"width": 16}}
    lines = [LINE | {"commit": "old"}, other, {"benchmark": "something else"}, LINE]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [(x["commit"], x["load"]["width"]) for x in bench_table.latest(path)] == [("abc", 16), ("abc", 64)]


def test_a_later_line_with_more_contestants_takes_the_place_of_one_with_fewer(tmp_path: Path) -> None:
    """And however often they were repeated; one with fewer leaves the peers' standing."""
    path = tmp_path / "bench.jsonl"
    few = LINE | {"commit": "few", "seconds": {"bare": [1.0]}, "load": LINE["load"] | {"repeats": 9}}
    for lines, expected in (([few, LINE], ["abc"]), ([LINE, few], ["abc", "few"])):
        path.write_text("\n".join(map(json.dumps, lines)))
        assert [x["commit"] for x in bench_table.latest(path)] == expected


def test_a_page_without_marks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert bench_table.main(["--page", str(page), "--results", str(ROOT / "results" / "bench.jsonl")]) == 2
    assert "page.md: needs <!-- bench --> once" in capsys.readouterr().err and page.read_text() == "no marks"


def test_the_page_is_what_the_results_say() -> None:
    words = ["--page", str(ROOT / "docs" / "engines.md"), "--results", str(ROOT / "results" / "bench.jsonl")]
    assert bench_table.main(["--check", *words]) == 0
