"""Balanced softmax (arXiv:2007.10740, eq. 4) in NumPy: -log( n_y^a e^{z_y} / sum_c n_c^a e^{z_c} ), classes without images left out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from tests.oracles import plain
from tests.oracles.test_priors import histograms, known

from mllm_fl.algorithms.balancedsoftmax import BalancedSoftmax
from mllm_fl.conformance.play import play
from mllm_fl.losses import balanced_softmax


def formula(z: plain.Array, y: plain.Array, n: plain.Array) -> float:
    e = n * np.exp(z)
    return float(-np.mean([np.log(row[c] / row.sum()) for row, c in zip(e, y, strict=True)]))


@pytest.mark.parametrize("prior", ["global", "local"])
def test_three_rounds_in_numpy(prior: Literal["global", "local"]) -> None:
    world, absent = plain.world(sizes=(16, 11, 2)), {(1, 2), (2, 0)}
    w, data, own = plain.of(world.w), [plain.seen(c) for c in world.clients], histograms(world)
    for t, counts in enumerate(known(world, 3, absent), 1):
        online = [k for k in range(3) if (t, k) not in absent]
        local = []
        for k in online:
            n = (counts[k] if prior == "global" else own[k]) ** 0.8
            m, y = data[k]
            local.append(plain.descend(plain.on(formula, m, y, n), w))
        w = plain.mean([(16, 11, 2)[k] for k in online], local)
    method = BalancedSoftmax(power=0.8, prior=prior)
    plain.near(play(method, world, 3, local=plain.LOCAL, absent=absent).state.w, w)


def test_the_pure_function_and_an_empty_class() -> None:
    z, y, n = np.random.default_rng(1).normal(0, 2, (6, 4)), np.array([0, 1, 3, 3, 0, 1]), np.array([5.0, 3, 0, 2])
    leaf = torch.from_numpy(z).requires_grad_(True)
    got = balanced_softmax(leaf, torch.from_numpy(y), torch.from_numpy(n))
    assert float(got.detach()) == pytest.approx(formula(z, y, n), rel=1e-10)
    (g,) = torch.autograd.grad(got, leaf)
    assert g[:, 2].tolist() == [0.0] * 6


def test_by_hand() -> None:
    """Counts 1 and 3, equal logits: p_0 = 1/4."""
    got = balanced_softmax(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1.0, 3.0]))
    assert float(got) == pytest.approx(np.log(4))
