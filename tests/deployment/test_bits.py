"""The same TOML in the simulator and on a federation: the same bits, over Flower's own messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.config import load
from mllm_fl.deployment.server import dotted
from mllm_fl.stages import chain

QUICK = {  # what makes these methods differ from FedAvg, and quick
    "fedavg": "",
    "fedprox": "federate.method.mu = 0.5",
    "fedavgm": "",
    "scaffold": "",
    "creff": "federate.method.features = 4, federate.method.match_steps = 2, federate.method.head_epochs = 2, federate.method.repeats = 1",
    "clip2fl": "federate.method.features = 4, federate.method.match_steps = 2, federate.method.head_epochs = 2, federate.method.repeats = 1",
}


def rows(path: Path) -> tuple[bytes, bytes]:
    return (path / "rounds.jsonl").read_bytes(), (path / "clients.jsonl").read_bytes()


@pytest.mark.parametrize("name", QUICK)
def test_a_federation_ends_with_the_simulators_bits(
    name: str, config: Path, deployed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = f'federate.algorithm = "{name}"' + (f", {QUICK[name]}" if QUICK[name] else "")
    [alone] = load(config, dotted(values)).runs
    simulated = chain.run(alone, tmp_path / "simulated")
    there = deployed(values)
    assert there["weights_sha256"] == simulated["weights_sha256"]
    assert rows(tmp_path / "runs" / "deployed" / there["name"]) == rows(chain.run_path(alone, tmp_path / "simulated"))
    assert there["environment"]["engine"]["name"] == "flower"
