"""Real processes on the loopback, with TLS and node keys: a round, and what is left after each of them was killed in the middle of one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.deployment.conftest import CONFIG
from tests.deployment.real import Federation, cli, differing, kill, memory, went_on

from mllm_fl.config import load
from mllm_fl.runs import environment, read_rows
from mllm_fl.stages import chain


def simulated(config: Path, root: Path, **values: Any) -> dict[str, Any]:
    """The same run, in this process."""
    [alone] = load(config, values).runs
    return chain.run(alone, root)


def test_up_on_one_machine_plays_a_round_with_the_simulators_bits(config: Path, tmp_path: Path, steady: Path) -> None:
    """`mllm-fl deploy up --local`: SuperLink, two SuperNodes, TLS and keys; about a minute on two idle cores."""
    there = steady / "there"
    words = ("up", "--local", "--nodes", "2", "--dir", str(there), str(config), "--set", "federate.rounds = 1")
    for _ in range(5):  # a machine too busy for Flower stops the run; the same line takes it up again
        with cli("deploy", *words, cwd=tmp_path) as process:
            said = process.communicate(timeout=1800)[0]
        if process.returncode == 0 or "mllm-fl deploy resume" not in said:
            break
    assert process.returncode == 0, said
    wanted = simulated(config, tmp_path / "runs", **{"federate.rounds": 1})
    assert f"weights {wanted['weights_sha256'][:16]}" in said and "4 of 4 clients" in said
    assert not (there / "sites" / "site-1" / "state" / "images").exists()


class Kill(NamedTuple):
    """``site``: whose answer must be out; "": any. ``reasons``: one of them is why the round is played again; none: the run has to be resumed.

    ``maybe``: Flower starts another process by itself where the killed one had not taken the message yet; then nothing is played again.
    """

    hit: Callable[[Federation], bool]
    site: str = ""
    reasons: tuple[str, ...] = ()
    maybe: bool = False


DIED, AGAIN = ("the client's process died",), ("its node was started again", "the node went away")
KILLS = {
    "a client's process": Kill(lambda fed: kill(fed.nodes["site-1"], "flwr-clientapp"), "site-1", DIED, maybe=True),
    "a SuperNode": Kill(lambda fed: kill(fed.nodes["site-2"]), "site-2", AGAIN),
    "the ServerApp": Kill(lambda fed: kill(fed.link, "flwr-serverapp")),
    "the SuperLink": Kill(lambda fed: kill(fed.link)),
    "the SuperLink's executor": Kill(lambda fed: kill(fed.link, "flower-superexec")),
}


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One federation for all kills: what one of them leaves behind is the next one's beginning."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "run.toml").write_text(CONFIG)
    with memory(folder) as place, Federation(place / "there", folder / "run.toml") as found:
        yield found


@pytest.mark.deploy
@pytest.mark.parametrize("what", KILLS)
def test_killed_in_the_middle_of_a_round_everything_ends_with_the_bits_of_an_unhurt_run(
    what: str, fed: Federation, config: Path, tmp_path: Path
) -> None:
    """SIGKILL while round 2 of SCAFFOLD, whose clients remember, is on its way. MLLM_FL_FAULTS: a file that takes what was measured."""
    hit, site, expected, maybe = KILLS[what]
    own = 0.05 + list(KILLS).index(what) / 1000  # a run of its own for each
    values = {"federate.rounds": 2, "federate.algorithm": "scaffold", "federate.local.lr": own}
    wanted = simulated(config, tmp_path / "runs", **values)
    [simulator] = (tmp_path / "runs" / "deployed").iterdir()
    said = ", ".join(f"{k} = {json.dumps(v)}" for k, v in values.items())
    run = fed.run(set=said, minimum=4, attempts=20, deadline=900.0, wait=900.0)
    path, at = run.path, run.strike(2, site, lambda: hit(fed))
    before = len(run.lines)
    final, ended = run.end(), time.time()
    reasons = {r for e in read_rows(path / "events.jsonl") for r in e.get("reasons", ())}
    if expected:
        assert reasons & set(expected) or (maybe and not reasons)
    else:
        assert f"mllm-fl deploy resume {path}" in run.lines[before]
    lost = sum(differing(path / name, simulator / name) for name in ("rounds.jsonl", "clients.jsonl"))
    assert lost == 0 and final["weights_sha256"] == wanted["weights_sha256"]
    if place := os.environ.get("MLLM_FL_FAULTS"):
        env = environment()
        row = {"killed": what, "seconds": round(went_on(path, 2, at) - at, 1), "to_end": round(ended - at, 1)}
        row |= {"reasons": sorted(reasons), "resumed": len(run.lines) - before, "resumed_before": before}
        row |= {"bytes_lost": lost, "load": os.getloadavg()[0]}
        row |= {k: env[k] for k in ("processor", "cores", "commit")} | {"time": round(ended)}
        with open(place, "a") as f:
            f.write(json.dumps(row) + "\n")
