"""Real processes on the loopback, with TLS and node keys: a round, and what is left after each of them was killed in the middle of one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.deployment.real import Federation, background, cli, in_round, kill, until

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


TABLE = Path("faults.json")
"""What the test of kills measured, in the folder that MLLM_FL_FAULTS names: `scripts/fault_table.py` makes the table in docs/deploy.md from it."""


@pytest.mark.deploy
def test_killed_in_the_middle_of_a_round_everything_ends_with_the_bits_of_an_unhurt_run(
    config: Path, tmp_path: Path, record_property: Any
) -> None:
    """SIGKILL to a ClientApp's process, a SuperNode, the ServerApp and the SuperLink, each in another round of one run of SCAFFOLD."""
    values = {"federate.rounds": 5, "federate.algorithm": "scaffold"}
    wanted = simulated(config, tmp_path / "runs", **values)
    table: list[dict[str, Any]] = []
    with Federation(tmp_path / "there", config) as fed:
        said = 'federate.rounds = 5, federate.algorithm = "scaffold"'
        path, number = fed.run(set=said, minimum=4, attempts=20, deadline=300.0, wait=900.0)

        def rounds() -> int:
            return len(read_rows(path / "rounds.jsonl")) if (path / "rounds.jsonl").exists() else 0

        def hurt(fault: str, did: str, strike: Any, mend: Any = None) -> None:
            before = rounds()
            until(lambda: in_round(path, before + 1) and strike())
            start = time.monotonic()
            if mend is not None:
                mend()
            until(lambda: rounds() > before, 1800)
            table.append({"fault": fault, "did": did, "seconds": round(time.monotonic() - start, 1), "lost": 0})
            (tmp_path / TABLE).write_text(json.dumps(table, indent=1))
            print(table[-1], flush=True)

        hurt("a client's process", "the round was played again", lambda: kill(fed.nodes["site-1"], "flwr-clientapp"))
        hurt(
            "a SuperNode",
            "its supervisor started it again; the round was played again",
            lambda: kill(fed.nodes["site-2"]),
        )

        def resumed() -> None:
            with pytest.raises(UserError, match="mllm-fl deploy resume"):
                follow.follow(fed.made, path, number, fed.say)
            again()

        def again() -> None:
            nonlocal number
            made, there, number = follow.resume(path, fed.say)
            assert (made.folder, there) == (fed.made.folder, path)

        hurt("the ServerApp", "mllm-fl deploy resume", lambda: kill(fed.link, "flwr-serverapp"), resumed)

        def back() -> None:
            until(lambda: control.ready(fed.made))
            resumed()

        hurt("the SuperLink", "its supervisor started it again; mllm-fl deploy resume", lambda: kill(fed.link), back)
        thread, box = background(lambda: follow.follow(fed.made, path, number, fed.say))
        thread.join(1800)
        final = box[0]
    assert final["weights_sha256"] == wanted["weights_sha256"]
    for name in ("rounds.jsonl", "clients.jsonl"):
        ours = chain.run_path(load(config, values).runs[0], tmp_path / "runs") / name
        assert (path / name).read_bytes() == ours.read_bytes()
    record_property("faults", json.dumps(table))
    assert [row["fault"] for row in table] == ["a client's process", "a SuperNode", "the ServerApp", "the SuperLink"]
