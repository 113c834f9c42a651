"""Fed-Focal loss (arXiv:2011.06283; focal loss arXiv:1708.02002, eq. 5) in NumPy: -alpha (1 - p_y)^gamma log p_y."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.fedfocal import FedFocal
from mllm_fl.conformance.play import play
from mllm_fl.losses import focal


def formula(z: plain.Array, y: plain.Array, gamma: float, alpha: float) -> float:
    p = np.array([row[c] for row, c in zip(plain.softmax(z), y, strict=True)])
    return float(np.mean(-alpha * (1 - p) ** gamma * np.log(p)))


def test_three_rounds_in_numpy() -> None:
    world = plain.world()
    w, data = plain.of(world.w), [plain.seen(c) for c in world.clients]
    for _ in range(3):
        local = [plain.descend(plain.on(formula, m, y, 1.5, 0.6), w) for m, y in data]
        w = plain.mean([16, 11, 7], local)
    plain.near(play(FedFocal(gamma=1.5, alpha=0.6), world, 3, local=plain.LOCAL).state.w, w)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, 1.0), (0.0, 0.25), (0.5, 1.0), (1.0, 1.0), (2.0, 0.25), (5.0, 3.0)])
def test_the_pure_function(gamma: float, alpha: float) -> None:
    z = np.random.default_rng(1).normal(0, 3, (7, 4))
    y = np.array([0, 1, 2, 3, 0, 1, 2])
    got = focal(torch.from_numpy(z), torch.from_numpy(y), gamma, alpha)
    assert float(got) == pytest.approx(formula(z, y, gamma, alpha), rel=1e-10)


def test_two_classes_by_hand() -> None:
    """p_y = 3/4: (1/4)^2 log(4/3) = 0.0179801."""
    z = torch.tensor([[3.0, 1.0]]).double().log()
    assert float(focal(z, torch.tensor([0]), 2.0)) == pytest.approx(0.0179801, abs=1e-7)


def test_the_gradient_is_finite_where_p_is_one() -> None:
    for gamma in (0.5, 1.0, 2.0):
        z = torch.tensor([[80.0, 0.0]], requires_grad=True)
        (g,) = torch.autograd.grad(focal(z, torch.tensor([0]), gamma), z)
        assert bool(torch.isfinite(g).all())
        assert float(g.abs().max()) < 1e-3


def test_gamma_0_is_cross_entropy_to_the_last_bit() -> None:
    rng = np.random.default_rng(2)
    for n in range(1, 40):
        z, y = torch.from_numpy(rng.normal(0, 3, (n, 5))).float(), torch.from_numpy(rng.integers(0, 5, n))
        assert torch.equal(focal(z, y, 0.0, 1.0), torch.nn.functional.cross_entropy(z, y))


def test_where_p_is_one_the_factor_is_kept_at_1e_12() -> None:
    """1 - p = e^-40 = 4.2e-18 counts as 1e-12: the loss is -sqrt(1e-12) log p, whose slope towards the other class is 1e-6 e^-40."""
    z = torch.tensor([[40.0, 0.0]]).double().requires_grad_()
    (g,) = torch.autograd.grad(focal(z, torch.tensor([0]), 0.5), z)
    assert float(g[0, 1]) / np.exp(-40) == pytest.approx(1e-6, rel=1e-3)
