"""Results: a run is one line, collecting it again replaces the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mllm_fl.errors import UserError
from mllm_fl.results import collect, read


def finished(path: Path, arm: str, seed: int, accuracy: float) -> Path:
    path.mkdir(exist_ok=True)
    (path / "final.json").write_text(
        json.dumps(
            {
                "experiment": "e",
                "name": path.name,
                "arm": arm,
                "seed": seed,
                "config_hash": "x",
                "last": {"accuracy": accuracy},
            }
        )
    )
    return path


def test_one_line_a_run_sorted_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "results" / "e.jsonl"
    b, a = finished(tmp_path / "b", "b", 1, 0.1), finished(tmp_path / "a", "a", 0, 0.2)
    (tmp_path / "unfinished").mkdir()
    assert collect([b, a, tmp_path / "unfinished"], out) == 2
    assert [r["arm"] for r in read(out)] == ["a", "b"]
    assert collect([finished(tmp_path / "b", "b", 1, 0.3)], out) == 2
    assert read(out)[1]["last"]["accuracy"] == 0.3


def test_nothing_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        collect([tmp_path], tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="no such results file"):
        read(tmp_path / "r.jsonl")
