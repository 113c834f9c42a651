"""FedAvg (arXiv:1602.05629, Algorithm 1) in NumPy: w <- sum_k p_k w_k, p_k = n_k / n over the clients that answered."""

from __future__ import annotations

import numpy as np
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import FedAvg, Server, Update
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.trees import weighted_mean


def test_three_rounds_in_numpy() -> None:
    world = plain.world()
    w, data = plain.of(world.w), [plain.seen(c) for c in world.clients]
    for t in (1, 2, 3):
        online = [k for k in range(3) if (t, k) != (2, 1)]
        local = [plain.descend(plain.on(plain.ce, *data[k]), w) for k in online]
        w = plain.mean([len(data[k][1]) for k in online], local)
    plain.near(play(FedAvg(), world, 3, local=plain.LOCAL, absent={(2, 1)}).state.w, w)


def test_mean_by_hand_with_buffers() -> None:
    """Weights 3 and 1: (3 * 2 + 1 * 6) / 4 = 3. The counter: (3 * 4 + 1 * 7) / 4 = 4.75, rounded to 5, an integer."""
    world = toy.world()
    names = ("classifier.bias", "backbone.bn.running_var")
    a, b = (world.w | {k: torch.full_like(world.w[k], v) for k in names} for v in (2.0, 6.0))
    a["backbone.bn.num_batches_tracked"], b["backbone.bn.num_batches_tracked"] = torch.tensor(4), torch.tensor(7)
    updates = [Update(0, a, 3.0, {}, {}), Update(1, b, 1.0, {}, {})]
    w = FedAvg().server(world.task, Server(world.w), iter(updates)).w
    assert all(np.allclose(w[k].numpy(), 3.0) for k in names)
    assert w["backbone.bn.num_batches_tracked"].item() == 5
    assert w["backbone.bn.num_batches_tracked"].dtype == torch.int64


def test_one_client_is_training_alone() -> None:
    world = plain.world(sizes=(9,))
    m, y = plain.seen(world.clients[0])
    w = plain.descend(plain.on(plain.ce, m, y), plain.of(world.w), steps=2 * plain.STEPS)
    plain.near(play(FedAvg(), world, 2, local=plain.LOCAL).state.w, w)


def test_every_entry_lies_between_the_clients() -> None:
    world = toy.world()
    played = play(FedAvg(), world, 1)
    for k, v in played.state.w.items():
        sent = torch.stack([u.w[k].double() for u in played.updates[0]])
        low, high = sent.min(0).values, sent.max(0).values
        room = 0.5 if k.endswith("tracked") else 1e-6
        assert bool(((v >= low - room) & (v <= high + room)).all()), k


def test_a_mean_carries_no_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert not weighted_mean([(1.0, {"a": leaf * 2})])["a"].requires_grad
