"""All clients in one program against one client after another: every method, every way in which clients can differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mllm_fl.algorithms import METHODS
from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Task
from mllm_fl.conformance.row import ROWS, row_of
from mllm_fl.conformance.toy import World
from mllm_fl.engines.base import Engine, open_engine
from mllm_fl.engines.batched import TOGETHER, BatchedEngine
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree, digest

LOCAL = LocalConfig(epochs=2, batch_size=8, lr=0.05)
ALONE = {"fedyoyo": "data-dependent"}
"""Methods whose objective cannot be one program (boolean masks), and a word of the reason that the record gives."""


def engine_named(name: str, world: World, method: Algorithm, local: LocalConfig = LOCAL, **options: Any) -> Engine:
    config = EngineConfig(name=name, device="cpu" if name == "batched" else "auto")  # type: ignore[arg-type]
    return open_engine(config, world.task, method, local, **options)


def rounds(
    name: str, world: World, method: Algorithm, count: int = 2, local: LocalConfig = LOCAL, **options: Any
) -> tuple[list[Tree], dict[int, Tree], Engine]:
    """What the clients send in each round (weights and extras, one tree), what they remember at last, and the engine."""
    state, memory, sent = method.init(world.task, world.w), dict[int, Tree](), []
    with engine_named(name, world, method, local, **options) as engine:
        for t in range(1, count + 1):
            online = [
                k for k in range(len(world.clients)) if (k + t) % 3 or t == 1
            ]  # the second round: some again, some not
            shards = [world.shard(k, t, method.needs) for k in online]
            replies = list(engine.clients(method.broadcast(state), shards, memory))
            assert [r.client for r in replies] == online
            memory |= {r.client: r.memory for r in replies}
            sent += [
                {f"{k}/{n}": v for n, v in {**r.update.w, **r.update.extra}.items()} for k, r in zip(online, replies)
            ]
            sent += [
                {"steps": torch.tensor(r.update.metrics["steps"]), "loss": torch.tensor(r.update.metrics["loss"])}
                for r in replies
            ]
            state = dataclasses.replace(method.server(world.task, state, iter([r.update for r in replies])), round=t)
    return sent, memory, engine


def apart(a: Tree, b: Tree) -> float:
    """The largest difference of two trees of one form."""
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    return max((float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel()), default=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_agrees_with_the_serial_engine(name: str) -> None:
    """Clients of 16, 11 and 7 images: batches 8 + 8, 8 + 3 and 7, two epochs; sums inside a convolution may be ordered otherwise."""
    row = row_of(name)
    world = row.world()
    expected, there, _ = rounds("serial", world, row.rich)
    found, here, engine = rounds("batched", world, row.rich)
    assert max(map(apart, found, expected)) < 1e-5
    assert here.keys() == there.keys()
    assert all(apart(here[k], there[k]) < 1e-5 for k in here)
    assert isinstance(engine, BatchedEngine)
    record = engine.record
    assert (record["clients"] == "one program") == (name not in ALONE)
    assert ALONE.get(name, "one program") in record["clients"]


@pytest.mark.parametrize("policy", ["average", "local", "reset"])
@pytest.mark.parametrize(
    "local",
    [
        LocalConfig(epochs=1, batch_size=4, momentum=0.9, weight_decay=1e-2),
        LocalConfig(epochs=2, batch_size=16, aug_mode="sample", augment="crop"),
        LocalConfig(epochs=1, batch_size=6, augment="none"),
    ],
    ids=["momentum, weight decay", "a crop for each image", "images as they are"],
)
def test_every_way_of_local_training_agrees(policy: str, local: LocalConfig) -> None:
    world = row_of("fedavg").world(sizes=(16, 11, 7, 11), idle=True)  # idle: a parameter that no loss reaches
    expected, there, _ = rounds("serial", world, FedAvg(), local=local, batch_norm=policy)
    found, here, _ = rounds("batched", world, FedAvg(), local=local, batch_norm=policy)
    assert max(map(apart, found, expected)) < 1e-5
    assert all(apart(here[k], there[k]) < 1e-5 for k in there)
    assert bool(here[0]) == (policy == "local")


def test_more_clients_than_fit_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = row_of("fedavg").world(sizes=(9, 8, 7, 6, 5))
    whole = rounds("batched", world, FedAvg())[0]
    monkeypatch.setitem(TOGETHER, "cpu", 2)
    assert max(map(apart, rounds("batched", world, FedAvg())[0], whole)) < 1e-6


def test_the_same_run_gives_the_same_bytes() -> None:
    world = row_of("scaffold").world()
    first, again = (rounds("batched", world, row_of("scaffold").rich)[0] for _ in range(2))
    assert [digest(a) for a in first] == [digest(a) for a in again]


@dataclasses.dataclass(frozen=True)
class Asks(FedAvg):
    """Looks at the value of its loss: an ``if`` that no program of many clients can take."""

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        loss = super().objective(task, w, msg, mine, x, y)
        return loss if float(loss) > 0 else 2 * loss


@dataclasses.dataclass(frozen=True)
class Counts(FedAvg):
    """Says something else under vmap, without an error: it divides by what it takes for the number of images."""

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        under_vmap = torch._C._functorch.is_batchedtensor(x)
        return super().objective(task, w, msg, mine, x, y) * (2 if under_vmap else 1)


@pytest.mark.parametrize(("method", "reason"), [(Asks(), "vmap"), (Counts(), "under vmap and")])
def test_what_cannot_be_one_program_is_trained_alone_and_said(method: Algorithm, reason: str) -> None:
    world = row_of("fedavg").world()
    said: list[dict[str, Any]] = []
    found, _, _ = rounds(
        "batched", world, method, on_event=lambda kind, **fields: said.append({"kind": kind, **fields})
    )
    assert [digest(a) for a in found] == [digest(a) for a in rounds("serial", world, method)[0]]  # the same loop
    assert [e["kind"] for e in said] == ["clients not batched", "engine"]  # once, and the record at the end
    assert reason in said[0]["reason"] and said[0]["method"] == type(method).__name__
    assert said[1]["clients"].startswith("one after another") and said[1]["deterministic"].startswith("yes")


@dataclasses.dataclass(frozen=True)
class Remembers(FedAvg):
    """Pulls towards a number it remembers where it has one, which only every second client has; an unread leaf is different everywhere."""

    def begin(self, task, msg, mine, shard):  # type: ignore[no-untyped-def]
        own = {"pull": torch.full((2,), float(shard.client))} if shard.client % 2 else {}
        return own | {f"unread/{shard.client}": torch.zeros(shard.client + 1)}

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        loss = super().objective(task, w, msg, mine, x, y)
        return loss + mine["pull"].sum() * w["classifier.bias"].square().sum() if "pull" in mine else loss


def test_only_what_a_method_looks_at_keeps_clients_apart() -> None:
    world = row_of("fedavg").world(sizes=(8, 8, 8, 8, 8))
    expected, there, _ = rounds("serial", world, Remembers())
    found, here, engine = rounds("batched", world, Remembers())
    assert max(map(apart, found, expected)) < 1e-5
    assert here.keys() == there.keys() and all(here[k].keys() == there[k].keys() for k in here)
    assert isinstance(engine, BatchedEngine) and engine.record["clients"] == "one program"


def test_evaluation_and_survey_are_the_serial_engines() -> None:
    row = row_of("ccvr")
    world = row.world()
    with engine_named("serial", world, row.rich) as serial, engine_named("batched", world, row.rich) as batched:
        assert torch.equal(serial.evaluate(world.w, world.test).counts, batched.evaluate(world.w, world.test).counts)
        msg, shards = Broadcast(world.w, {}), [world.shard(k, 1) for k in range(3)]
        pairs = zip(serial.survey(msg, shards), batched.survey(msg, shards), strict=True)
        assert all(k == j and digest(a) == digest(b) for (k, a), (j, b) in pairs)


def test_every_method_of_the_package_is_in_the_comparison() -> None:
    assert sorted(ROWS) == sorted(METHODS)


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    world = row_of("fedavg").world()
    with pytest.raises(UserError, match=r"^federate\.engine\.device: 'cuda' with the serial engine"):
        EngineConfig(name="serial", device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^federate\.engine\.device: 'cuda', but torch finds no CUDA device"):
            open_engine(EngineConfig(name="batched", device="cuda"), world.task, FedAvg(), LOCAL)
