"""Real processes on the loopback, with TLS and node keys: a round, and what is left after each of them was killed in the middle of one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.deployment.real import Federation, cli, in_round, kill, status, until

from mllm_fl.config import load
from mllm_fl.deployment import control, follow
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows
from mllm_fl.stages import chain


def simulated(config: Path, root: Path, **values: Any) -> dict[str, Any]:
    """The same run, in this process."""
    [alone] = load(config, values).runs
    return chain.run(alone, root)


def test_up_on_one_machine_plays_a_round_with_the_simulators_bits(config: Path, tmp_path: Path) -> None:
    """`mllm-fl deploy up --local`: SuperLink, two SuperNodes, TLS and keys; about a minute on two idle cores."""
    words = ("up", "--local", "--nodes", "2", "--dir", "there", str(config), "--set", "federate.rounds = 1")
    with cli("deploy", *words, cwd=tmp_path) as process:
        said = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, said
    wanted = simulated(config, tmp_path / "runs", **{"federate.rounds": 1})
    assert f"weights {wanted['weights_sha256'][:16]}" in said and "4 of 4 clients" in said
    assert not (tmp_path / "there" / "sites" / "site-1" / "state" / "images").exists()


def _client(fed: Federation) -> bool:
    return kill(fed.nodes["site-1"], "flwr-clientapp")


def _node(fed: Federation) -> bool:
    return kill(fed.nodes["site-2"])


def _server_app(fed: Federation) -> bool:
    return kill(fed.link, "flwr-serverapp")


def _link(fed: Federation) -> bool:
    return kill(fed.link)


KILLS: dict[
    str, tuple[Callable[[Federation], bool], bool]
] = {  # what is killed -> how, and whether the run must be resumed
    "a client's process": (_client, False),
    "a SuperNode": (_node, False),
    "the ServerApp": (_server_app, True),
    "the SuperLink": (_link, True),
}


@pytest.mark.deploy
@pytest.mark.parametrize("what", KILLS)
def test_killed_in_the_middle_of_a_round_everything_ends_with_the_bits_of_an_unhurt_run(
    what: str, config: Path, tmp_path: Path
) -> None:
    """SIGKILL while round 2 of SCAFFOLD, whose clients remember, is on its way. MLLM_FL_FAULTS: a file that takes what was measured."""
    strike, must_resume = KILLS[what]
    wanted = simulated(config, tmp_path / "runs", **{"federate.rounds": 2, "federate.algorithm": "scaffold"})
    with Federation(tmp_path / "there", config) as fed:
        path, number = fed.run(set='federate.rounds = 2, federate.algorithm = "scaffold"', minimum=4, attempts=20, deadline=600.0, wait=900.0)  # fmt: skip
        until(lambda: in_round(path, 2) and strike(fed), 1800)
        start = time.monotonic()
        if must_resume:
            with pytest.raises(UserError, match="mllm-fl deploy resume"):
                follow.follow(fed.made, path, number, fed.say)
            until(lambda: control.ready(fed.made))
            noticed = time.monotonic()
            _, there, number = follow.resume(path, fed.say)
            assert there == path
        final = until(lambda: _final(fed, path, number), 1800)
        went_on = time.monotonic() - start
    assert final["weights_sha256"] == wanted["weights_sha256"]
    simulator = next((tmp_path / "runs" / "deployed").iterdir())
    for name in ("rounds.jsonl", "clients.jsonl"):
        assert (path / name).read_bytes() == (simulator / name).read_bytes()
    reasons = {r for e in read_rows(path / "events.jsonl") for r in e.get("reasons", ())}
    measured = {"killed": what, "seconds": round(went_on, 1), "reasons": sorted(reasons), "resumed": must_resume}
    measured |= {"bytes_lost": 0, "to_notice": round(noticed - start, 1) if must_resume else None}
    if place := os.environ.get("MLLM_FL_FAULTS"):
        with open(place, "a") as f:
            f.write(json.dumps(measured) + "\n")


def _final(fed: Federation, path: Path, number: str) -> dict[str, Any] | None:
    """final.json's content once it is there; one line if the run stopped."""
    if not (path / "final.json").exists():
        if "stopped" in status(path):
            raise AssertionError(status(path)["stopped"])
        return None
    return follow.follow(fed.made, path, number, fed.say)
