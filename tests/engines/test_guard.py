"""A user's method that writes into what it is given, or onto itself, stops with one line that says what and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests import toy
from torch import Tensor

from mllm_fl.algorithms.base import Broadcast, FedAvg, Local, Server, Shard, Task, Update
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
from mllm_fl.runs import RunFolder
from mllm_fl.stages.federate import federate
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import Tree, clone


class WritesIntoBroadcast(FedAvg):
    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        msg.w["classifier.bias"].mul_(0.9)
        return super().objective(task, w, msg, mine, x, y)


class AddsToBroadcast(FedAvg):
    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        msg.extra["more"] = msg.w["classifier.bias"]
        return super().finish(task, local, msg, mine)


class WritesIntoMemory(FedAvg):
    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        mine["seen"].add_(1)
        return mine


class StoresOnItself(FedAvg):
    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        self.v = local.w  # type: ignore[misc]  # only a class that is itself a frozen dataclass refuses this
        return super().finish(task, local, msg, mine)


class ServerWritesIntoWeights(FedAvg):
    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        s.w["classifier.bias"].zero_()
        return super().server(task, s, updates)


class ServerBreaks(FedAvg):
    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        raise KeyError("momentum")


CLIENTS = [
    (WritesIntoBroadcast, r"WritesIntoBroadcast: a client's hook changed the broadcast in place \(classifier.bias\)"),
    (AddsToBroadcast, r"changed what was sent beside it in place \(more\)"),
    (WritesIntoMemory, r"changed its memory in place \(seen\); clone what you write into"),
    (StoresOnItself, r"stored 'v' on the object; keep it in Server.extra"),
]


@pytest.mark.parametrize(("method", "sentence"), CLIENTS)
def test_a_client_hook(method: Any, sentence: str) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    local = LocalConfig(epochs=1, batch_size=8, lr=0.05)
    mine = {"seen": w["classifier.bias"].clone()}
    shard = Shard(0, 1, fed.client(0), 0)
    train_client(task, FedAvg(), Broadcast(clone(w), {}), mine, shard, local)  # FedAvg is left alone
    with pytest.raises(UserError, match=sentence):
        train_client(task, method(), Broadcast(clone(w), {}), mine, shard, local)


SERVERS = [
    (ServerWritesIntoWeights, r"server changed the server's weights in place \(classifier.bias\)"),
    (ServerBreaks, "ServerBreaks: server failed in round 1: KeyError: 'momentum'"),
]


@pytest.mark.parametrize(("method", "sentence"), SERVERS)
def test_the_server_hook(method: Any, sentence: str, tmp_path: Path) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    name = f"{method.__module__}:{method.__name__}"
    config = FederateConfig(algorithm=name, rounds=1, clients_per_round=2, local=LocalConfig(epochs=1), method=method())
    with RunFolder(tmp_path / "run", {"name": "toy"}) as run, pytest.raises(UserError, match=sentence):
        federate(config, task, fed, w, run)
