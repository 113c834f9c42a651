"""tau-normalisation (arXiv:1910.09217, eq. 3) in NumPy: w_c / ||w_c||^tau, the bias dropped or kept; the rounds are FedAvg's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import FedAvg, Server
from mllm_fl.algorithms.taunorm import TauNorm
from mllm_fl.conformance.play import play
from mllm_fl.statistics import tau_normalised


@pytest.mark.parametrize(("tau", "bias"), [(1.0, False), (0.5, True), (2.0, False)])
def test_deployed_weights_in_numpy(tau: float, bias: bool) -> None:
    world = plain.world()
    played, fedavg = play(TauNorm(tau=tau, bias=bias), world, 2), play(FedAvg(), world, 2).state.w
    expected = plain.of(fedavg)
    rows = [row / np.sqrt((row**2).sum()) ** tau for row in expected["classifier.weight"]]
    plain.near(played.deployed, expected | {
        "classifier.weight": np.array(rows),
        "classifier.bias": expected["classifier.bias"] * bias,
    })  # fmt: skip
    plain.near(played.state.w, expected, 1e-9)


def test_rows_by_hand() -> None:
    """(3, 4) has length 5: tau 1 makes it (0.6, 0.8), tau 2 (0.12, 0.16); a row of zeros stays, tau 0 changes nothing."""
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(tau_normalised(w, 1), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(tau_normalised(w, 2), torch.tensor([[0.12, 0.16], [0.0, 0.0], [0.0, 0.5]]))
    assert torch.equal(tau_normalised(w, 0), w)


def test_equal_lengths_keep_the_order_of_classes() -> None:
    world = plain.world()
    weight = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]) * 3
    state = Server(world.w | {"classifier.weight": weight, "classifier.bias": torch.zeros(3)})
    z = [
        world.task.forward(w, world.test.normalised(range(6)))[1]
        for w in (state.w, TauNorm().deploy(world.task, state))
    ]
    assert z[0].argsort(1).equal(z[1].argsort(1))
