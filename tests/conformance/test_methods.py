"""One suite for every method: a new method joins by one row in ROWS, or is found in METHODS and tried at its defaults.

Neutral value = FedAvg bit for bit; default value differs from FedAvg; permutation of clients and of arrival changes nothing; one client;
clients with one class, one image, no image; identical clients; purity of the hooks; a client that sends nonsense.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mllm_fl.algorithms import METHODS, find
from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Local, Shard, Task, Update
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.trees import Tree, digest
from tests import toy

LOCAL = LocalConfig(epochs=2, batch_size=8, lr=0.05, augment="crop")
ROWS: dict[str, dict[str, Any]] = {  # name -> fields under which the method must differ from FedAvg on the toy
    "fedavg": {},
    "fedprox": {"mu": 0.5},
    **{k: {} for k in ("fedavgm", "fednova", "feddf", "fedbe", "ccvr", "fedfocal", "ratioloss", "taunorm", "scaffold")},
    **{k: {} for k in ("logitadjust", "balancedsoftmax", "fedyoyo")},
    "creff": {"features": 5, "match_steps": 10, "head_epochs": 10, "repeats": 2},
    # this toy has no teacher and no texts
    "clip2fl": {"features": 5, "head_epochs": 10, "alpha": 0.0, "contrast": 0.0},
}
METHOD = pytest.mark.parametrize("name", sorted(METHODS))


def play(
    method: Algorithm, shards: list[ImageSet], rounds: int = 2, arrival: list[int] | None = None
) -> tuple[Task, Tree]:
    """A few rounds by hand, without engine or run folder; ``arrival``: the order in which clients are trained."""
    fed = toy.federation()
    net_task, w = toy.task(fed)
    task = dataclasses.replace(
        net_task,
        population=tuple(map(len, shards)),
        unlabelled=toy.images(20, seed=5),
        labelled=toy.images(4, seed=6),
    )
    state, memory = method.init(task, w), {}  # type: ignore[var-annotated]
    for t in range(1, rounds + 1):
        msg = method.broadcast(state)
        updates: dict[int, Update] = {}
        for k in arrival or range(len(shards)):
            shard = Shard(k, t, shards[k], task.seed)
            if len(shard):
                updates[k], memory[k] = train_client(task, method, msg, memory.get(k, {}), shard, LOCAL)
        state = dataclasses.replace(method.server(task, state, (updates[k] for k in sorted(updates))), round=t)
    return task, method.deploy(task, state)


def some_clients() -> list[ImageSet]:
    fed = toy.federation(clients=3)
    return [fed.client(k) for k in range(3)]


def rich(name: str) -> Algorithm:
    return find(name)(**ROWS.get(name, {}))


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == sorted(METHODS)


@METHOD
def test_neutral_value_is_fedavg_bit_for_bit(name: str) -> None:
    cls = find(name)
    assert digest(play(cls(**cls.neutral), some_clients())[1]) == digest(play(FedAvg(), some_clients())[1])


@METHOD
def test_the_method_does_something(name: str) -> None:
    if name == "fedavg":
        fed = toy.federation()
        assert digest(play(FedAvg(), some_clients())[1]) != digest(toy.task(fed)[1])
    else:
        assert digest(play(rich(name), some_clients())[1]) != digest(play(FedAvg(), some_clients())[1])


@METHOD
def test_order_of_arrival_changes_nothing(name: str) -> None:
    a = play(rich(name), some_clients(), arrival=[0, 1, 2])[1]
    b = play(rich(name), some_clients(), arrival=[2, 0, 1])[1]
    assert digest(a) == digest(b)


@METHOD
def test_identical_clients_equal_one_client(name: str) -> None:
    """Clients with the same images differ only by their streams; one that trains alone is the reference for its own stream."""
    one = some_clients()[:1]
    task, w = play(rich(name), one, rounds=1)
    shard = Shard(0, 1, one[0], task.seed)
    method = rich(name)
    state = method.init(task, toy.task(toy.federation())[1])
    update, _ = train_client(task, method, method.broadcast(state), {}, shard, LOCAL)
    twice = method.server(task, state, [update, update._replace(client=1)])
    assert digest(method.deploy(task, twice)) == digest(w)


@METHOD
def test_odd_clients_train(name: str) -> None:
    base = some_clients()[0]
    one_class = base.subset(np.flatnonzero(base.labels == base.labels[0]).tolist())
    _, w = play(rich(name), [base, one_class, base.subset([0]), base.subset([])])
    assert all(bool(torch.isfinite(v).all()) for v in w.values())


@METHOD
def test_hooks_are_pure(name: str) -> None:
    """The broadcast, the memory and the object itself are unchanged by a client's round and by the server's step."""
    method, fed = rich(name), toy.federation()
    task, w = toy.task(fed)
    state = method.init(task, w)
    msg, shard = method.broadcast(state), Shard(0, 1, fed.client(0), 0)
    _, mine = train_client(task, method, msg, {}, shard, LOCAL)
    before = digest(msg.w), digest(msg.extra), digest(mine), digest(state.w), copy.deepcopy(vars(method))
    update, _ = train_client(task, method, msg, mine, shard, LOCAL)
    sent = digest(update.w)
    method.server(task, state, [update])
    assert (digest(msg.w), digest(msg.extra), digest(mine), digest(state.w), vars(method)) == before
    assert digest(update.w) == sent
    assert dataclasses.replace(method) == method


@METHOD
def test_trains_the_same_bits_whatever_else_draws(name: str) -> None:
    a = play(rich(name), some_clients())[1]
    torch.manual_seed(99)
    torch.rand(1000)
    np.random.rand(1000)
    assert digest(a) == digest(play(rich(name), some_clients())[1])


@METHOD
def test_says_what_it_is(name: str) -> None:
    cls = find(name)
    module = __import__(cls.__module__, fromlist=["x"]).__doc__ or ""
    assert "arXiv" in module
    assert set(cls.neutral) <= {f.name for f in dataclasses.fields(cls)}
    assert isinstance(cls.uploads, str) and isinstance(cls.downloads, str)


def test_the_suite_catches_a_method_that_changes_its_broadcast() -> None:
    class Careless(FedAvg):
        def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
            msg.w["classifier.bias"].add_(1)
            return super().finish(task, local, msg, mine)

    task, w = toy.task(toy.federation())
    msg = FedAvg().broadcast(FedAvg().init(task, w))
    before = digest(msg.w)
    train_client(task, Careless(), msg, {}, Shard(0, 1, toy.federation().client(0), 0), LOCAL)
    assert digest(msg.w) != before
