"""Rubbish beside the weights is refused in a real run: an update by its row and reason, a survey's answer by an event."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests import toy

from mllm_fl.algorithms.base import Broadcast, Local, Shard, Task, Update
from mllm_fl.algorithms.ccvr import CCVR
from mllm_fl.algorithms.scaffold import Scaffold
from mllm_fl.engines.local import LocalConfig
from mllm_fl.runs import RunFolder, read_json, read_rows
from mllm_fl.stages.federate import federate
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import Tree, digest

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05)
K = "classifier.bias"


@dataclasses.dataclass(frozen=True)
class Rubbish(Scaffold):
    """Client 0 sends something else than its variate."""

    what: str = "shape"

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, kept = super().finish(task, local, msg, mine)
        if local.client:
            return update, kept
        rest = {k: v for k, v in update.extra.items() if k != K}
        spoilt = {"shape": {K: torch.zeros(99)}, "missing": {}, "surplus": {K: update.extra[K], "more": torch.zeros(1)}}
        return update._replace(extra=rest | spoilt[self.what]), kept


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("shape", f"{K}: shape (99,) instead of (3,)"),
        ("missing", f"{K}: missing"),
        ("surplus", "more: not among what is sent"),
    ],
)
def test_an_update_with_rubbish_beside_it_is_dropped_and_the_round_goes_on(
    tmp_path: Path, what: str, reason: str
) -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    config = FederateConfig(
        algorithm=f"{__name__}:Rubbish", method=Rubbish(what=what), rounds=2, clients_per_round=2, local=LOCAL
    )
    with RunFolder(tmp_path / "bad", {}) as run:
        state = federate(config, task, fed, w, run)
        rows = read_rows(run.path / "clients.jsonl")
        assert [(r["status"], r["reason"]) for r in rows] == [("rejected", reason), ("ok", None)] * 2
    only = dataclasses.replace(fed, manifest=dataclasses.replace(fed.manifest, clients=((), fed.manifest.clients[1])))
    config = dataclasses.replace(config, algorithm="scaffold", method=Scaffold())
    with RunFolder(tmp_path / "good", {}) as run:
        expected = federate(config, task, only, w, run)
    assert (digest(state.w), digest(state.extra)) == (digest(expected.w), digest(expected.extra))


@dataclasses.dataclass(frozen=True)
class Misled(CCVR):
    """Client 1 answers with a mean that is not a number."""

    def survey(self, task: Task, msg: Broadcast, shard: Shard) -> Tree:
        answer = super().survey(task, msg, shard)
        return {k: v * float("nan") if k.endswith("mean") else v for k, v in answer.items()} if shard.client else answer


def test_a_survey_goes_on_without_the_answer_that_is_not_one(tmp_path: Path) -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    method = Misled(samples=9, epochs=1)
    config = FederateConfig(algorithm=f"{__name__}:Misled", method=method, rounds=1, clients_per_round=2, local=LOCAL)
    with RunFolder(tmp_path / "bad", {}) as run:
        state = federate(config, task, fed, w, run)
        (event,) = [e for e in read_rows(run.path / "events.jsonl") if e["event"] == "answer refused"]
        assert (event["client"], event["reason"]) == (1, "0/mean: NaN")
        assert (read_json(run.path / "survey.json")["clients"], read_json(run.path / "survey.json")["refused"]) == (
            2,
            1,
        )
    assert all(bool(torch.isfinite(v).all()) for v in state.w.values())
    assert not torch.equal(state.w[K], w[K])
