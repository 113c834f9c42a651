"""docs/deploy.md's tables: lines in words that can be checked by hand, and the page is not stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts import deploy_tables

ROOT = Path(__file__).parents[1]
WHERE: dict[str, Any] = {"processor": "A chip", "cores": 2, "commit": "0123456789abcdef"}


def killed(what: str, seconds: float, load: float = 1.0) -> dict[str, Any]:
    return WHERE | {"killed": what, "seconds": seconds, "bytes_lost": 0, "load": load}


def rounds(nodes: int, worker: bool, seconds: list[float]) -> dict[str, Any]:
    median = sorted(seconds[1:])[len(seconds) // 2 - 1]
    return WHERE | {"nodes": nodes, "worker": worker, "seconds": seconds, "seconds_a_round": median, "rounds": 3, "load": 3.0}  # fmt: skip


def test_the_last_line_of_each_fault_is_a_row() -> None:
    rows = [killed("the ServerApp", 99.0), killed("the ServerApp", 41.4), killed("a SuperNode", 83.7, 9.0)]
    said = deploy_tables.faults(rows).splitlines()
    assert [line.split(" | ")[2:] for line in said[2:4]] == [["84", "0 |"], ["41", "0 |"]]
    assert "`mllm-fl deploy resume`" in said[3] and said[3].startswith("| the ServerApp |")
    assert said[-1] == "A chip, 2 cores; commit 012345678; load average 1.0 to 9.0, what is measured included."


def test_seconds_a_round_are_medians_with_their_range() -> None:
    said = deploy_tables.cost([rounds(2, False, [30.0, 9.0, 11.0, 10.0]), rounds(2, True, [9.0, 5.0, 4.0, 6.0])])
    assert "| 2 | 10.0 s (9.0 to 11.0) | 5.0 s (4.0 to 6.0) | 3 |" in said  # the first round, 30 s, is left out


def test_the_page_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["deploy_tables", "--check"])
    assert deploy_tables.main() == 0
