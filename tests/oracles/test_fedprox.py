"""FedProx (arXiv:1812.06127, eq. 2) in NumPy: clients descend CE + mu/2 ||w - w^t||^2."""

from __future__ import annotations

import numpy as np
from tests.oracles import plain

from mllm_fl.algorithms.fedprox import FedProx
from mllm_fl.conformance.play import play


def test_three_rounds_in_numpy() -> None:
    world, mu = plain.world(), 0.6
    w, data = plain.of(world.w), [plain.seen(c) for c in world.clients]
    for _ in range(3):
        local = []
        for m, y in data:

            def loss(v: plain.W, m: plain.Array = m, y: plain.Array = y, anchor: plain.W = w) -> float:
                far = sum(float(np.sum((v[k] - anchor[k]) ** 2)) for k in v)
                return plain.ce(plain.logits(v, m), y) + mu / 2 * far

            local.append(plain.descend(loss, w))
        w = plain.mean([16, 11, 7], local)
    plain.near(play(FedProx(mu=mu), world, 3, local=plain.LOCAL).state.w, w)
