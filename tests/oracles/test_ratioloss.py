"""Ratio loss (arXiv:2008.06217, section 3) in NumPy: a copy a class, the ratio of how the classifier moved, weighted cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import Server, Update
from mllm_fl.algorithms.ratioloss import RatioLoss
from mllm_fl.conformance.play import play
from mllm_fl.errors import UserError
from mllm_fl.losses import weighted_cross_entropy
from mllm_fl.statistics import ratio_weights


def ratios(changes: plain.Array, alpha: float, beta: float) -> plain.Array:
    """Entry by entry: the class with the largest change speaks, unless another moved by more than 0.8 of it."""
    classes = len(changes)
    flat = changes.reshape(classes, -1)
    own, others = np.zeros(classes), np.zeros(classes)
    for entry in range(flat.shape[1]):
        column = flat[:, entry]
        c = int(np.argmax(column))
        rest = np.delete(column, c)
        if column[c] <= 0 or np.max(np.abs(rest)) > 0.8 * column[c]:
            continue
        own[c] += column[c]
        others[c] += rest.mean()
    r = [10.0 if b == 0 else min(abs(a) / abs(b), 5000.0) for a, b in zip(own, others, strict=True)]
    return alpha + beta * np.array(r)


@pytest.mark.parametrize(
    ("alpha", "beta", "normalise"), [(1.1, 0.3, False), (1.1, 0.3, True), (1.0, 1.0, False), (2.0, 0.0, False)]
)
def test_three_rounds_in_numpy(alpha: float, beta: float, normalise: bool) -> None:
    world = plain.world(("labelled",))
    assert world.task.labelled is not None
    w, data, weights = plain.of(world.w), [plain.seen(c) for c in world.clients], np.ones(3)
    m_server, y_server = plain.seen(world.task.labelled)
    used = []
    for _ in range(3):
        used.append(weights)
        local = []
        for m, y in data:

            def loss(v: plain.W, m: plain.Array = m, y: plain.Array = y, a: plain.Array = weights) -> float:
                log_p = plain.log_softmax(plain.logits(v, m))
                return float(np.mean([-a[c] * row[c] for row, c in zip(log_p, y, strict=True)]))

            local.append(plain.descend(loss, w))
        w = plain.mean([16, 11, 7], local)
        changes = []
        for c in range(3):
            m = m_server[y_server == c]
            copy = plain.descend(plain.on(plain.ce, m, np.full(len(m), c)), w, 2, 0.2)
            changes.append(copy["classifier.weight"] - w["classifier.weight"])
        weights = ratios(np.array(changes), alpha, beta)
        weights = weights / weights.mean() if normalise else weights
    played = play(RatioLoss(alpha=alpha, beta=beta, steps=2, lr=0.2, normalise=normalise), world, 3, local=plain.LOCAL)
    assert beta == 0 or not np.allclose(used[1], used[2], rtol=1e-4)
    for msg, expected in zip(played.sent, used, strict=True):
        assert np.allclose(msg.extra["weights"].numpy(), expected, rtol=2e-3)  # a ratio of small differences in float32
    plain.near(played.state.w, w, 1e-3)


def test_the_monitor_by_loops() -> None:
    rng = np.random.default_rng(3)
    for scale in (1.0, 1e-4):
        changes = rng.normal(0, 1, (4, 4, 5)) * scale
        got = ratio_weights(torch.from_numpy(changes), 1.0, 0.1).numpy()
        assert np.allclose(got, ratios(changes, 1.0, 0.1), rtol=1e-5)
    assert np.allclose(ratio_weights(torch.from_numpy(7 * changes)).numpy(), got)  # a common factor cancels


def test_the_monitor_by_hand() -> None:
    """Class 0 moves entry 0 by 3, the others by -1 and -0.5: R = 3 / 0.75 = 4. Entry 1 is contested. Class 2 speaks alone: 10."""
    changes = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 0.9, 0.0], [-0.5, 0.0, 2.0]])
    assert torch.allclose(ratio_weights(changes), torch.tensor([1.4, 2.0, 2.0]))
    assert torch.allclose(ratio_weights(changes, 0.5, 1.0), torch.tensor([4.5, 10.5, 10.5]))
    near = torch.tensor([[1.0, 0.0], [1e-5, 1.0]])
    assert torch.allclose(ratio_weights(near, 0.0, 1.0), torch.tensor([5000.0, 10.0]))  # the cap, and nothing below
    assert torch.allclose(
        ratio_weights(torch.tensor([[5.0], [-4.0]]), 0.0, 1.0), torch.tensor([1.25, 10.0])
    )  # 0.8 is allowed
    assert torch.allclose(ratio_weights(torch.tensor([[5.0], [-4.01]]), 0.0, 1.0), torch.tensor([10.0, 10.0]))


def test_symmetric_classes_have_equal_weights() -> None:
    assert ratio_weights(torch.eye(4) * 2 - 0.5).unique().numel() == 1


def test_weights_are_not_renormalised() -> None:
    """Weights 2 and 0, equal logits: (2 log 2 + 0) / 2 = log 2; torch's own weights would divide by 2 instead of by the batch."""
    got = weighted_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([2.0, 0.0]))
    assert float(got) == pytest.approx(np.log(2))


def test_missing_images_are_named() -> None:
    world = plain.world(("labelled",))
    updates = [Update(0, world.w, 1.0, {}, {})]
    state = Server(world.w, {"weights": torch.ones(3)})
    assert world.task.labelled is not None
    few = replace(world.task, labelled=world.task.labelled.subset([0, 1, 11]))
    with pytest.raises(UserError, match="needs images of every class, 'class 1' has none"):
        RatioLoss().server(few, state, iter(updates))
    with pytest.raises(UserError, match="federate.server.labelled: ratio loss needs balanced labelled images"):
        RatioLoss().server(replace(world.task, labelled=None), state, iter(updates))
    off = RatioLoss(alpha=2.0, beta=0.0).server(replace(world.task, labelled=None), state, iter(updates))
    assert off.extra["weights"].tolist() == [2.0] * 3
