"""Logit adjustment (arXiv:2007.07314, eq. 10) in NumPy: CE of logits + tau log prior, the prior known or the client's own."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from tests.oracles import plain
from tests.oracles.test_priors import histograms, known

from mllm_fl.algorithms.logitadjust import LogitAdjust
from mllm_fl.conformance.play import play
from mllm_fl.losses import logit_adjusted


def formula(z: plain.Array, y: plain.Array, prior: plain.Array, tau: float) -> float:
    return plain.ce(z + tau * np.log(np.maximum(prior, 1e-9)), y)


@pytest.mark.parametrize("prior", ["global", "local"])
def test_three_rounds_in_numpy(prior: Literal["global", "local"]) -> None:
    world, absent = plain.world(sizes=(16, 11, 2)), {(1, 2), (2, 0)}
    w, data, own = plain.of(world.w), [plain.seen(c) for c in world.clients], histograms(world)
    assert min(own[2]) == 0  # a class that this client lacks: its prior is the floor
    for t, counts in enumerate(known(world, 3, absent), 1):
        online = [k for k in range(3) if (t, k) not in absent]
        local = []
        for k in online:
            n = counts[k] if prior == "global" else own[k]
            (m, y), p = data[k], n / n.sum()
            local.append(plain.descend(plain.on(formula, m, y, p, 0.7), w))
        w = plain.mean([(16, 11, 2)[k] for k in online], local)
    plain.near(play(LogitAdjust(tau=0.7, prior=prior), world, 3, local=plain.LOCAL, absent=absent).state.w, w)


def test_the_pure_function() -> None:
    z, y = np.random.default_rng(1).normal(0, 2, (6, 4)), np.array([0, 1, 3, 3, 0, 1])
    prior = np.array([0.5, 0.3, 0.0, 0.2])
    got = logit_adjusted(torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(prior), 1.3)
    assert float(got) == pytest.approx(formula(z, y, prior, 1.3), rel=1e-10)


def test_the_optimum_is_the_likelihood_ratio() -> None:
    """With priors 3/4 and 1/4 and equal logits the adjusted probability of class 0 is 3/4: loss log(4/3)."""
    got = logit_adjusted(torch.zeros(1, 2).double(), torch.tensor([0]), torch.tensor([0.75, 0.25]).double())
    assert float(got) == pytest.approx(np.log(4 / 3))


def test_a_class_without_a_prior_counts_as_1e_9() -> None:
    """Equal logits, priors 0 and 1: -log(1e-9 / (1 + 1e-9)) = 9 log 10 = 20.7233 for the class that nobody has."""
    z, prior = torch.zeros(1, 2).double(), torch.tensor([0.0, 1.0]).double()
    assert float(logit_adjusted(z, torch.tensor([0]), prior)) == pytest.approx(20.7233, abs=1e-4)
    assert float(logit_adjusted(z, torch.tensor([0]), prior, 0.5)) == pytest.approx(10.3617, abs=1e-4)
