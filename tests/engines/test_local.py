"""The client loop against plain PyTorch: one client is centralised SGD, running statistics included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import toy

from mllm_fl.algorithms.base import Broadcast, FedAvg, Shard
from mllm_fl.data.augment import augment
from mllm_fl.engines.local import LocalConfig, augmented, train_client
from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, digest, weighted_mean

LOCAL = LocalConfig(epochs=3, batch_size=8, lr=0.1, momentum=0.9, weight_decay=1e-3)


def centralised(rounds: int) -> Tree:
    """What a textbook training loop gives: nn.Module, DataLoader-like batches, torch.optim.SGD, no library of ours but the streams."""
    fed = toy.federation(clients=1)
    net = build_network(ModelConfig(width=2), 3, 0).train()
    images = fed.client(0)
    x_all, y_all = images.normalised(range(len(images))), torch.from_numpy(images.labels)
    for t in range(1, rounds + 1):
        shuffle, draws = stream(0, "shuffle", t, 0), stream(0, "augment", t, 0)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(3):
            for batch in torch.randperm(len(images), generator=shuffle).split(8):
                optimiser.zero_grad()
                F.cross_entropy(
                    net(augment(x_all[batch], draws, padding=1, flip=True, mode="batch"))[1], y_all[batch]
                ).backward()
                optimiser.step()
    return dict(net.state_dict())


def test_one_client_is_centralised_sgd_including_batch_norm() -> None:
    fed = toy.federation(clients=1)
    task, w = toy.task(fed)
    state = FedAvg().init(task, w)
    for t in (1, 2):
        update, _ = train_client(task, FedAvg(), FedAvg().broadcast(state), {}, Shard(0, t, fed.client(0), 0), LOCAL)
        state = FedAvg().server(task, state, [update])
    expected = centralised(2)
    assert any("running_mean" in k for k in expected)
    for k, v in expected.items():
        assert torch.equal(state.w[k], v), k


def test_two_clients_average_by_hand_including_batch_norm() -> None:
    fed = toy.federation(clients=2, per_class=7)
    task, w = toy.task(fed)
    sent = [
        train_client(task, FedAvg(), Broadcast(w, {}), {}, Shard(k, 1, fed.client(k), 0), LOCAL)[0] for k in range(2)
    ]
    state = FedAvg().server(task, FedAvg().init(task, w), sent)
    n = [u.weight for u in sent]
    assert n == [11.0, 10.0] or n == [10.0, 11.0]
    for k in ("classifier.weight", "backbone.bn.running_mean", "backbone.bn.running_var"):
        by_hand = (sent[0].w[k].double() * n[0] + sent[1].w[k].double() * n[1]) / 21
        assert torch.allclose(state.w[k].double(), by_hand, atol=1e-7, rtol=0)
        assert not torch.equal(sent[0].w[k], sent[1].w[k])
    assert state.w["backbone.bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("policy", ["average", "local", "reset"])
def test_batch_norm_policy_decides_what_a_client_starts_from(policy: str) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    w["backbone.bn.running_mean"] = torch.full((2,), 5.0)
    w["backbone.bn.running_var"] = torch.full((2,), 3.0)
    seen: list[float] = []
    variance: list[float] = []

    class Spy(FedAvg):
        def begin(self, task, msg, mine, shard):  # type: ignore[no-untyped-def]
            return mine

        def objective(self, task, w, msg, mine, x, y):  # type: ignore[no-untyped-def]
            seen.append(float(w["backbone.bn.running_mean"][0]))
            variance.append(float(w["backbone.bn.running_var"][0]))
            return super().objective(task, w, msg, mine, x, y)

    _, mine = train_client(task, Spy(), Broadcast(w, {}), {}, Shard(0, 1, fed.client(0), 0), LOCAL, policy)
    first = seen[0]
    assert variance[0] == (1.0 if policy == "reset" else 3.0)
    remembered = digest(mine)
    seen.clear()
    update, _ = train_client(task, Spy(), Broadcast(w, {}), mine, Shard(0, 2, fed.client(0), 0), LOCAL, policy)
    assert first == (0.0 if policy == "reset" else 5.0)
    assert (seen[0] == first) == (policy != "local")  # its own last statistics are neither 5 nor 0
    assert "backbone.bn.running_mean" in update.w
    assert digest(mine) == remembered  # training moves the client's own copy, not its memory of last time


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_clients_crop_with_the_padding_that_the_helper_says(side: int) -> None:
    """Of digits (16) and CIFAR (32) 2 and 4 pixels; at 28 an eighth is no whole number and is rounded, not cut."""
    x = torch.rand(3, 3, side, side, generator=stream(0, "x"))
    padding = {8: 1, 16: 2, 28: 4, 32: 4}[side]
    expected = augment(x, stream(0, "augment"), padding=padding, flip=True, mode="sample")
    assert torch.equal(augmented(x, LocalConfig(aug_mode="sample"), stream(0, "augment")), expected)


def test_last_partial_batch_is_kept_and_steps_are_counted() -> None:
    fed = toy.federation(clients=1, per_class=7)  # 21 images: 8 + 8 + 5
    task, w = toy.task(fed)
    update, _ = train_client(task, FedAvg(), Broadcast(w, {}), {}, Shard(0, 1, fed.client(0), 0), LOCAL)
    assert update.metrics["steps"] == 9
    assert update.weight == 21
    assert update.w["backbone.bn.num_batches_tracked"].item() == 9


def test_large_shards_are_read_batch_by_batch_with_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    args: Any = (task, FedAvg(), Broadcast(w, {}), {}, Shard(0, 1, fed.client(0), 0), LOCAL)
    whole = digest(train_client(*args)[0].w)
    monkeypatch.setattr("mllm_fl.engines.local._fits", lambda shard: False)
    assert digest(train_client(*args)[0].w) == whole


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1.0)],
)
def test_out_of_range_values_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^federate.local.{field}: "):
        LocalConfig(**{field: value})  # type: ignore[arg-type]


def test_weighted_mean_of_updates_is_what_the_server_returns() -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    sent = [
        train_client(task, FedAvg(), Broadcast(w, {}), {}, Shard(k, 1, fed.client(k), 0), LOCAL)[0] for k in range(2)
    ]
    assert digest(FedAvg().server(task, FedAvg().init(task, w), sent).w) == digest(
        weighted_mean((u.weight, u.w) for u in sent)
    )
