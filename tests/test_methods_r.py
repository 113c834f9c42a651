"""The table and the cards of protocol R are what the committed results say, and they say it right on numbers made up for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/methods_r.py as a module."""
    spec = importlib.util.spec_from_file_location("methods_r", ROOT / "scripts" / "methods_r.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """After new results: ``python scripts/methods_r.py --runs runs/methods_r``."""
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def run(arm: str, mean: float | None, last: float, start: float | None = None) -> dict[str, Any]:
    return {
        "arm": arm, "algorithm": arm, "seed": 0, "config_hash": arm, "environment": {"commit": "abc"},
        "mean_last": None if mean is None else {"mean": mean, "sd": 0.02}, "max": {"accuracy": 0.9},
        "last": {"accuracy": last, "many": 0.5, "medium": 0.4, "few": None}, "from": {"accuracy": start},
        "seconds": {"clients": 10.0, "server": 1.0}, "bytes_up": 2e6, "bytes_down": 3e6,
    }  # fmt: skip


RUNS = [run("taunorm", None, 0.45, 0.40), run("fedavg", 0.30, 0.40), run("fedprox", 0.35, 0.36)]
KNOWN = {("fedavg", "fedavg", 0): {2: 0.2, 4: 0.3}, ("fedprox", "fedprox", 0): {2: 0.25, 4: 0.39}}


def test_arms_are_sorted_and_post_hoc_ones_stand_apart(script: Any) -> None:
    """0.05 and 0.09 better in two rounds: +7.0, sd 2.8. tau-norm gains 5 over FedAvg's last model, whatever FedAvg's mean."""
    by_arm = script.arms(RUNS)
    assert list(by_arm) == ["fedprox", "fedavg", "taunorm"]
    above, below = script.table(by_arm, KNOWN).split("Post-hoc")
    assert "| fedprox | 1 | 35.0 | 2.0 | +7.0 ± 2.8 | 36.0 | 90.0 | 50.0 | 40.0 | – | 10 | 1 | 2 | 3 |" in above
    assert "| fedavg | 1 | 30.0 | 2.0 | – | 40.0 |" in above
    assert "taunorm" not in above
    assert "| taunorm | 1 | 40.0 | 45.0 | +5.0 | 50.0 | 40.0 | – |" in below
    assert script.paired([RUNS[2]], by_arm, {}) == []


def test_a_card_holds_the_published_value_ours_the_rule_and_what_differs(script: Any) -> None:
    cards = script.cards(script.arms(RUNS), KNOWN)
    card = next(c for c in cards.split("## ") if c.startswith("FedProx"))
    assert "56.92 % (arXiv:2409.06067 Table 2" in card
    assert (
        "35.0 %; sd over these rounds 2.0; rule: mean of the last ten rounds, 1 seed. Minus FedAvg, round by round: +7.0 ± 2.8."
        in card
    )
    assert "commit abc, configuration fedprox, seed 0" in card
    assert "What we change: clients are drawn uniformly" in card
    assert cards.count("## ") == 16
    assert "not run yet" in next(c for c in cards.split("## ") if c.startswith("FedYoYo"))


def test_curves_come_from_finished_runs_with_rounds(script: Any, tmp_path: Path) -> None:
    for name, final in (("a", run("fedavg", 0.3, 0.4)), ("b", run("taunorm", None, 0.4, 0.3))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "final.json").write_text(json.dumps(final))
        rows = [{"round": 1, "accuracy": None}, {"round": 2, "accuracy": 0.25}]
        (tmp_path / name / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert script.taken(tmp_path) == [
        {"arm": "fedavg", "seed": 0, "config_hash": "fedavg", "round": [2], "accuracy": [0.25]}
    ]
    assert script.main(["--runs", str(tmp_path / "none")]) == 2
