"""A post-hoc method on a finished FedAvg run gives the weights of the method's own full run; other runs and methods are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mllm_fl.algorithms import METHODS, find
from mllm_fl.config import Config, from_dict
from mllm_fl.errors import UserError
from mllm_fl.stages.chain import run, run_path
from mllm_fl.stages.posthoc import from_finished, is_posthoc


def config(algorithm: str = "fedavg", rounds: int = 2, **method: Any) -> Config:
    return from_dict(
        {
            "experiment": "posthoc",
            "name": algorithm,
            "data": {"imbalance_factor": 10, "clients": 4, "image_size": 8},
            "model": {"width": 2},
            "federate": {
                "algorithm": algorithm, "rounds": rounds, "clients_per_round": 2, "local": {"epochs": 1, "lr": 0.05}, "method": method,
            },
        },
        "test",
    )  # fmt: skip


METHOD: dict[str, dict[str, Any]] = {"ccvr": {"samples": 50, "epochs": 2}, "taunorm": {"tau": 0.7}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run(config(), root)
    return run_path(config(), root)


@pytest.mark.parametrize("name", METHOD)
def test_equals_the_full_run(name: str, finished: Path, tmp_path: Path) -> None:
    asked = config(name, **METHOD[name])
    full = run(asked, tmp_path / "full")
    short = from_finished(asked, finished, tmp_path / "short")
    assert short["weights_sha256"] == full["weights_sha256"]
    assert short["last"] == full["last"] and all(short[k] == full[k] for k in ("bytes_up", "bytes_down"))
    assert short["from"]["run"] == finished.name and short["mean_last"] is None
    assert from_finished(asked, finished, tmp_path / "short") == short  # a second time it is read, not made


def test_only_methods_that_leave_the_rounds_alone() -> None:
    assert {name for name in METHODS if is_posthoc(find(name))} == {"fedavg", "ccvr", "taunorm"}


def test_what_is_no_use_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--from: fedprox changes the rounds themselves"):
        from_finished(config("fedprox"), finished, tmp_path)
    with pytest.raises(UserError, match=r"made with another configuration: federate.rounds \(2 -> 3\)"):
        from_finished(config("taunorm", rounds=3), finished, tmp_path)
    with pytest.raises(UserError, match="no finished run here"):
        from_finished(config("taunorm"), tmp_path, tmp_path)
    weights = finished / "model.safetensors"
    good = weights.read_bytes()
    try:
        run(config(rounds=1), tmp_path)
        weights.write_bytes((run_path(config(rounds=1), tmp_path) / "model.safetensors").read_bytes())
        with pytest.raises(UserError, match="is not the model that the run's final.json describes"):
            from_finished(config("taunorm"), finished, tmp_path)
    finally:
        weights.write_bytes(good)
