"""The same TOML in the simulator and on a federation: the same bits, over Flower's own messages, also after a kill in the middle of a round."""

from __future__ import annotations

import json
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


class Killed(BaseException):
    """What no code of ours catches to go on."""


def rows(path: Path) -> tuple[bytes, bytes]:
    return (path / "rounds.jsonl").read_bytes(), (path / "clients.jsonl").read_bytes()


def dies_in_round(t: int) -> Any:
    """The server ends when it hands this node its message of round ``t``; nodes before it have trained that round and remember it."""

    def fault(message: Any, answer: Callable[[], Any]) -> Any:
        if message.metadata.message_type == "train" and message.metadata.group_id == str(t):
            raise Killed
        return answer()

    return fault


@pytest.mark.parametrize("name", QUICK)
def test_a_federation_ends_with_the_simulators_bits_killed_and_resumed_or_not(
    name: str, config: Path, deployed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = f'federate.algorithm = "{name}"' + (f", {QUICK[name]}" if QUICK[name] else "")
    [alone] = load(config, dotted(values)).runs
    simulated = chain.run(alone, tmp_path / "simulated")
    bits = rows(chain.run_path(alone, tmp_path / "simulated"))
    there = deployed(values)
    assert there["weights_sha256"] == simulated["weights_sha256"]
    assert rows(tmp_path / "runs" / "deployed" / there["name"]) == bits
    assert there["environment"]["engine"]["name"] == "flower"

    hurt = tmp_path / "hurt"
    with pytest.raises(Killed):
        deployed(values, {103: dies_in_round(2)}, runs=str(hurt))
    [path] = (hurt / "deployed").iterdir()
    assert len(rows(path)[0].splitlines()) == 1 and not (path / "final.json").exists()
    begun = json.loads((path / "deployment.json").read_text())
    resumed = deployed(**begun["settings"])  # what `mllm-fl deploy resume` submits
    assert resumed["weights_sha256"] == simulated["weights_sha256"] and rows(path) == bits


def test_a_server_that_falls_back_two_rounds_gets_the_memories_of_that_time(
    config: Path, deployed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """SCAFFOLD's control variates of rounds 3 and 4 lie on nodes when the server, whose checkpoint is of round 2, plays round 3 again."""
    values = 'federate.algorithm = "scaffold", federate.rounds = 4, federate.checkpoint_every = 2, federate.clients_per_round = 5'
    [alone] = load(config, dotted(values)).runs
    simulated = chain.run(alone, tmp_path / "simulated")
    with pytest.raises(Killed):
        deployed(values, {103: dies_in_round(4)})
    assert deployed(values)["weights_sha256"] == simulated["weights_sha256"]
    [path] = (tmp_path / "runs" / "deployed").iterdir()
    assert rows(path) == rows(chain.run_path(alone, tmp_path / "simulated"))
    assert "lost its memory" not in (path / "events.jsonl").read_text()
