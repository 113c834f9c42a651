"""docs/overhead.md says what results/quickstart.jsonl holds."""

from __future__ import annotations

from typing import Any

from scripts import overhead_table


def row(arm: str, seed: int, align: float) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "bytes_up": 2_000_000, "bytes_down": 4_000_000,
        "environment": {"commit": "abc", "processor": "a chip", "cores": 2},
        "seconds": {"clients": 10, "align": align},
        "overhead": {
            "flop": {"clients": 3e9, "align": 5e9}, "flop_rule": "counted", "annotation": None, "joules": {"cpu": None},
            "per_visit": {"flop": 1e9, "seconds": 2, "bytes_up": 1000, "bytes_down": 2000}, "peak_bytes": {"process": 7e6},
        },
    }  # fmt: skip


def test_a_cell_is_the_median_over_seeds_and_what_nobody_measured_is_said() -> None:
    said = overhead_table.table([row("align", 0, 1), row("align", 1, 30), row("align", 2, 20)]).splitlines()
    assert "| alignment: seconds | not measured | 20 | not measured | not measured |" in said
    assert "| server, alignment: GFLOP | not measured | 5 | not measured | not measured |" in said
    assert "| whole run: MB down | not measured | 4.0 | not measured | not measured |" in said
    assert "| energy: joules | not measured | not measured | not measured | not measured |" in said
    assert said[-1] == "Medians over seeds 0, 1, 2. a chip, 2 cores; commit abc. Counted."


def test_the_page_is_the_results(monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["overhead_table", "--check"])
    assert overhead_table.main() == 0
