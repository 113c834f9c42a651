"""FedAvgM (arXiv:1909.06335) in NumPy: v <- beta v + mean change, w <- w + lr v; the EMA form damps the change by 1 - beta."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import Update
from mllm_fl.algorithms.fedavgm import FedAvgM
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play


@pytest.mark.parametrize(("form", "damping"), [("sum", 1.0), ("ema", 0.3)])
def test_three_rounds_in_numpy(form: Literal["sum", "ema"], damping: float) -> None:
    world = plain.world()
    w, data = plain.of(world.w), [plain.seen(c) for c in world.clients]
    v = {k: 0 * a for k, a in w.items()}
    for t in range(3):
        local = [plain.descend(plain.on(plain.ce, m, y), w) for m, y in data]
        average = plain.mean([16, 11, 7], local)
        v = {k: 0.7 * v[k] + (damping if t else 1) * (average[k] - w[k]) for k in w}
        w = {k: w[k] + 0.5 * v[k] for k in w}
    method = FedAvgM(momentum=0.7, form=form, server_lr=0.5)
    plain.near(play(method, world, 3, local=plain.LOCAL).state.w, w)


def test_a_constant_change_grows_like_a_geometric_series() -> None:
    """Clients always send w + 1: v_t = (1 - beta^t) / (1 - beta), so 1, 1.5, 1.75 at beta 1/2, and w = 1, 2.5, 4.25."""
    world = toy.world()
    state, bias = FedAvgM(momentum=0.5).init(world.task, world.w), "classifier.bias"
    start = world.w[bias]
    for expected in (1.0, 2.5, 4.25):
        sent = state.w | {bias: state.w[bias] + 1}
        state = FedAvgM(momentum=0.5).server(world.task, state, [Update(0, sent, 4.0, {}, {})])
        assert torch.allclose(state.w[bias] - start, torch.full((3,), expected), atol=1e-6)


def test_ema_starts_at_full_speed_and_stays_there() -> None:
    """Clients always send w + 1: v = 1 from the first change on, so w moves by 1 a round, not by 1 - beta."""
    world, method = toy.world(), FedAvgM(momentum=0.97, form="ema")
    state, bias = method.init(world.task, world.w), "classifier.bias"
    for expected in (1.0, 2.0, 3.0):
        sent = state.w | {bias: state.w[bias] + 1}
        state = method.server(world.task, state, [Update(0, sent, 4.0, {}, {})])
        assert torch.allclose(state.w[bias] - world.w[bias], torch.full((3,), expected), atol=1e-5)


def test_statistics_are_averaged_without_momentum() -> None:
    world = toy.world()
    state, mean = FedAvgM(momentum=0.5).init(world.task, world.w), "backbone.bn.running_mean"
    for expected in (1.0, 2.0):
        sent = state.w | {mean: state.w[mean] + 1}
        state = FedAvgM(momentum=0.5).server(world.task, state, [Update(0, sent, 4.0, {}, {})])
        assert torch.allclose(state.w[mean], torch.full((6,), expected))
