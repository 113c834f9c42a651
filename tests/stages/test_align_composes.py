"""Stage 3 beside every method: what is aligned, what is broadcast next, and what the method keeps for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests import toy

from mllm_fl.algorithms import METHODS
from mllm_fl.algorithms.base import Algorithm, Broadcast, Server, Shard, Task, Update
from mllm_fl.conformance.row import row_of
from mllm_fl.data.federation import Federation
from mllm_fl.engines.base import Reply
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.serial import SerialEngine
from mllm_fl.runs import RunFolder, read_rows
from mllm_fl.seeds import stream
from mllm_fl.stages.align import AlignConfig, Aligner, delivered, make_aligner
from mllm_fl.stages.alignment_images import balanced
from mllm_fl.stages.federate import federate
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import Tree, digest

ALIGN = AlignConfig(per_class=6, steps=15, batch_size=9, lr=0.05, augment="none")
LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.02, augment="none")
ROUNDS = 2


class Heard(SerialEngine):
    """The serial engine, remembering what it was told to broadcast and what came back."""

    def __init__(self, task: Task, method: Algorithm) -> None:
        super().__init__(EngineConfig(name="serial"), task, method, LOCAL, "average")
        self.sent: list[Broadcast] = []
        self.updates: list[list[Update]] = []

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        self.sent.append(msg)
        replies = list(super().clients(msg, shards, memory))
        self.updates.append([r.update for r in replies])
        return iter(replies)


def resources(method: Algorithm) -> tuple[Federation, Task, Tree, dict[int, torch.Tensor]]:
    """A federation of 60 images, and the server's part of what ``method`` needs."""
    fed = toy.federation()
    task, w = toy.task(fed)
    wide = w["classifier.weight"].shape[1]
    bare = toy.images(4, seed=7, name="toy/unlabelled")
    task = dataclasses.replace(
        task,
        unlabelled=bare if "unlabelled" in method.needs else None,
        labelled=toy.images(4, seed=8, name="toy/labelled") if "labelled" in method.needs else None,
        texts=F.normalize(torch.randn(3, wide, generator=stream(0, "texts")), dim=1)
        if "texts" in method.needs
        else None,
    )
    teacher = {k: 5.0 * F.one_hot(torch.from_numpy(fed.client(k).labels), 3).float() for k in range(len(fed.clients))}
    return fed, task, w, teacher if "teacher" in method.needs else {}


def loss(task: Task, aligner: Aligner, w: Tree) -> float:
    """Eq. (6) over all of D_align."""
    with torch.no_grad():
        p = task.forward(w, aligner.x, train=False)[1].log_softmax(1)
        q = aligner.q_logits.log_softmax(1)
        return float(F.nll_loss(p, aligner.y) + aligner.config.beta * (q.exp() * (q - p)).sum(1).mean())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_aligned_after_every_aggregation_and_goes_on_from_there(name: str, tmp_path: Path) -> None:
    """Played again by hand, round by round: server step, alignment of the weights alone, broadcast; equal in every bit."""
    method = row_of(name).rich
    fed, task, w0, teacher = resources(method)
    images = balanced(fed.train, 6, stream(0, "x"))
    aligner = make_aligner(ALIGN, images, lambda x: 4.0 * F.one_hot(torch.from_numpy(x.labels), 3).float())
    config = FederateConfig(algorithm=name, rounds=ROUNDS, clients_per_round=3, local=LOCAL, method=method)
    engine = Heard(task, method)
    with engine, RunFolder(tmp_path / "r", {}) as run:
        end = federate(config, task, fed, w0, run, aligner=aligner, teacher=teacher, engine=engine)
        rows = read_rows(run.path / "rounds.jsonl")
    state = method.init(task, w0)
    for t, (msg, updates) in enumerate(zip(engine.sent, engine.updates, strict=True), start=1):
        told = method.broadcast(state)
        assert (digest(msg.w), digest(msg.extra)) == (digest(told.w), digest(told.extra)), t
        state = dataclasses.replace(method.server(task, state, iter(updates)), round=t)
        aligned, _ = aligner(task, state.w, t)
        assert loss(task, aligner, aligned) < loss(task, aligner, state.w)
        state = Server(aligned, state.extra, t)  # what the method keeps for itself is its own
    assert all(r["align_loss"] is not None for r in rows) and len(engine.sent) == ROUNDS
    if not method.concludes:
        assert (digest(end.w), digest(end.extra)) == (digest(state.w), digest(state.extra))
    shipped, plain = delivered(method, task, end, aligner), method.deploy(task, end)
    assert loss(task, aligner, shipped) <= loss(task, aligner, plain)
    assert all(torch.isfinite(v).all() for v in shipped.values() if v.is_floating_point())
