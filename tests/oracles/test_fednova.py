"""FedNova (arXiv:2007.07481, eq. 7) in NumPy: changes per local step, times the mean number of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_fl.algorithms.base import Broadcast, Local, Server, Update
from mllm_fl.algorithms.fednova import FedNova, normaliser
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import LOCAL, play


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_normaliser_is_what_momentum_adds_up_to(steps: int, momentum: float) -> None:
    """||a||_1 by unrolling: each gradient of size one moves the weights by its share of every later step."""
    buffer = total = 0.0
    for _ in range(steps):
        buffer = momentum * buffer + 1
        total += buffer
    assert normaliser(steps, momentum) == pytest.approx(total)


def test_server_in_numpy_and_buffers_as_fedavg() -> None:
    world = toy.world()
    state = Server({k: v.clone() for k, v in world.w.items()})
    steps, images = (2.0, 5.0, 9.0), (16.0, 11.0, 7.0)
    sent = [
        {k: v + 0.1 * (i + 1) * torch.arange(v.numel()).view(v.shape) if v.is_floating_point() else v + i for k, v in world.w.items()}
        for i in range(3)
    ]  # fmt: skip
    updates = [
        Update(i, sent[i], images[i], {"a": torch.tensor([steps[i]], dtype=torch.float64)}, {}) for i in range(3)
    ]
    got = FedNova().server(world.task, state, iter(updates)).w
    p = np.array(images) / sum(images)
    tau = float((p * np.array(steps)).sum())
    for k, v in world.w.items():
        old, new = v.double().numpy(), [s[k].double().numpy() for s in sent]
        if k in world.task.trainable:
            d = sum(p[i] * (old - new[i]) / steps[i] for i in range(3))
            expected = old - tau * d
            assert np.array_equal(got[k].numpy(), expected.astype(np.float32)), k  # summed in float64, rounded once
        else:
            expected = sum(p[i] * new[i] for i in range(3))
        assert np.abs(got[k].double().numpy() - expected).max() < (0.5 if k.endswith("tracked") else 1e-4), k
    off = FedNova(normalise=False).server(world.task, state, iter(updates)).w
    bias = sum(p[i] * sent[i]["classifier.bias"].double().numpy() for i in range(3))
    assert np.allclose(off["classifier.bias"].numpy(), bias, atol=1e-6)


def test_equal_steps_are_fedavg_up_to_rounding() -> None:
    world = toy.world(sizes=(9, 9, 9))
    a, b = (play(FedNova(normalise=n), world, local=replace(LOCAL, augment="none")).state.w for n in (True, False))
    assert all(torch.allclose(a[k].double(), b[k].double(), atol=1e-6) for k in a)


def test_client_sends_its_own_number_of_steps() -> None:
    world = toy.world()
    local = Local(1, world.w, 6, 0.5, world.shard(1, 1), 0.05, 0.5)
    update, mine = FedNova().finish(world.task, local, Broadcast(world.w, {}), {})
    unrolled = sum(sum(0.5**j for j in range(i + 1)) for i in range(6))
    assert update.extra["a"].item() == pytest.approx(unrolled)
    assert update.weight == 11.0
    assert mine == {}
