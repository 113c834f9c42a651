"""CCVR (arXiv:2106.05001, eq. 3-5) in NumPy: moments of features pooled exactly, then the classifier alone is trained on draws from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import FedAvg
from mllm_fl.algorithms.ccvr import CCVR
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.seeds import stream
from mllm_fl.statistics import gaussian, moments, pooled_moments


def on_draws(z: plain.Array, y: plain.Array) -> Callable[[plain.W], float]:
    """Cross-entropy of the classifier alone on features ``z``."""
    return lambda v: plain.ce(z @ v["classifier.weight"].T + v["classifier.bias"], y)


def test_the_survey_pools_to_the_moments_of_all_features() -> None:
    """eq. (4), (5): what the server computes is mean and unbiased covariance of the class's features wherever they lie."""
    world = plain.world(sizes=(16, 11, 2))
    played = play(CCVR(samples=3, epochs=1), world, 1, local=plain.LOCAL)
    w = plain.of(play(FedAvg(), world, 1, local=plain.LOCAL).state.w)
    data = [plain.seen(c) for c in world.clients]
    for c in range(3):
        features = np.concatenate([(m * w["scale"])[y == c] for m, y in data])
        parts = [(int(a[f"{c}/n"]), a[f"{c}/mean"], a[f"{c}/cov"]) for a in played.answers.values() if f"{c}/n" in a]
        n, mean, cov = pooled_moments(parts)
        assert n == len(features)
        assert np.abs(mean.numpy() - features.mean(0)).max() < 1e-6
        assert np.abs(cov.numpy() - np.cov(features.T, ddof=1)).max() < 1e-6
        assert len(parts) == sum(int((y == c).any()) for _, y in data)


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 1, 1), (7,), (1, 6), (0, 4), (1,)])
def test_pooling_is_exact(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.normal(k, 1 + k, (n, 4)) for k, n in enumerate(sizes)]
    n, mean, cov = pooled_moments(moments(torch.from_numpy(p)) for p in parts)
    union = np.concatenate(parts)
    assert n == len(union)
    assert np.abs(mean.numpy() - union.mean(0)).max() < 1e-13
    expected = np.cov(union.T, ddof=1) if len(union) > 1 else np.zeros((4, 4))
    assert np.abs(cov.numpy() - expected).max() < 1e-12


def test_pooling_by_hand_and_of_nothing() -> None:
    """{0, 2} and {4}: mean 2, variance (4 + 0 + 4) / 2 = 4; one image has covariance 0, not NaN."""
    parts = [moments(torch.tensor(v).view(-1, 1)) for v in ([0.0, 2.0], [4.0], [])]
    assert [float(p[2]) for p in parts] == [2.0, 0.0, 0.0]
    n, mean, cov = pooled_moments(parts)
    assert (n, float(mean), float(cov)) == (3, 2.0, 4.0)
    with pytest.raises(ValueError, match="no part has an image"):
        pooled_moments([parts[2]])


def test_draws_have_the_moments() -> None:
    a = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])  # singular in its third direction
    z = gaussian(torch.tensor([1.0, -2.0, 3.0]).double(), torch.from_numpy(a), 20000, stream(0, "x")).numpy()
    assert np.abs(z.mean(0) - [1, -2, 3]).max() < 0.03
    assert np.abs(np.cov(z.T) - a).max() < 0.06
    assert np.abs(z[:, 2] - 3).max() < 1e-6
    lopsided = torch.from_numpy(a - 1e-9 * np.eye(3))  # slightly indefinite: an eigenvalue below zero counts as zero
    assert bool(torch.isfinite(gaussian(torch.zeros(3).double(), lopsided, 5, stream(0, "x"))).all())


def test_the_classifier_is_retrained_in_numpy() -> None:
    """All images of a class are one image, so its covariance is 0 and every draw is its feature: full-batch SGD on three points."""
    base, world = toy.images(1, name="one each"), plain.world()
    held = [base.subset([0, 0, 0, 1]), base.subset([1, 1, 2]), base.subset([2, 2, 0, 0, 0])]
    world = world.holding(held)
    w = plain.of(play(FedAvg(), world, 1, local=plain.LOCAL).state.w)
    m, y = plain.seen(base)
    z = m * w["scale"]
    head = {k: w[k] for k in ("classifier.weight", "classifier.bias")}
    speed = {k: 0 * v for k, v in head.items()}
    for _ in range(5):
        g = plain.slope(on_draws(z, y), head, tuple(head))
        speed = {k: 0.9 * speed[k] + g[k] + 1e-5 * head[k] for k in head}
        head = {k: head[k] - 0.3 * speed[k] for k in head}
    method = CCVR(samples=4, epochs=5, lr=0.3, batch_size=1000)
    plain.near(play(method, world, 1, local=plain.LOCAL).deployed, {**w, **head})


def test_a_class_that_nobody_holds_is_left_out_and_statistics_stay() -> None:
    world = toy.world(classes=4)
    world = world.holding([c.subset(np.flatnonzero(c.labels < 2).tolist()) for c in world.clients])
    a, b = play(CCVR(samples=8, epochs=1, lr=0.1), world, 1), play(FedAvg(), world, 1)
    assert all(torch.equal(a.deployed[k], b.deployed[k]) for k in a.deployed if k not in world.task.head)
    assert not torch.equal(a.deployed["classifier.weight"], b.deployed["classifier.weight"])
    assert set(a.answers[0]) == {f"{c}/{leaf}" for c in (0, 1) for leaf in ("n", "mean", "cov")}


def test_epochs_are_passes_over_all_draws_in_batches() -> None:
    """Three draws a class in batches of four: three steps an epoch, the last of one draw; the order is the named stream's."""
    base = toy.images(1, name="one each")
    world = plain.world().holding([base])
    w = plain.of(play(FedAvg(), world, 1, local=plain.LOCAL).state.w)
    m, y = (v.repeat(3, 0) for v in plain.seen(base))
    z = m * w["scale"]
    head = {k: w[k] for k in ("classifier.weight", "classifier.bias")}
    speed = {k: 0 * v for k, v in head.items()}
    draws = world.task.stream("calibrate")
    order = [b.numpy() for _ in range(2) for b in torch.randperm(9, generator=draws).split(4)]
    assert [len(b) for b in order] == [4, 4, 1, 4, 4, 1]
    for b in order:
        g = plain.slope(on_draws(z[b], y[b]), head, tuple(head))
        speed = {k: 0.9 * speed[k] + g[k] + 1e-5 * head[k] for k in head}
        head = {k: head[k] - 0.1 * speed[k] for k in head}
    method = CCVR(samples=3, epochs=2, lr=0.1, batch_size=4)
    plain.near(play(method, world, 1, local=plain.LOCAL).deployed, {**w, **head})


def test_what_the_survey_sends() -> None:
    """Per class 8 bytes of count, d floats of mean and d * d of covariance; d is 3 here."""
    task = plain.world().task
    assert CCVR().upload_bytes(task, 2) == 2 * (8 + 12 + 36)
    assert CCVR(samples=0).upload_bytes(task, 2) == 0


def test_without_samples_nobody_is_asked() -> None:
    world = plain.world()
    msg = CCVR().broadcast(CCVR().init(world.task, world.w))
    assert CCVR(samples=0).survey(world.task, msg, world.shard(0, 1)) == {}
    assert len(CCVR(samples=1).survey(world.task, msg, world.shard(0, 1))) == 9


def test_without_samples_nothing_is_asked() -> None:
    """Neutral: no answer has a form; else count, mean and covariance of each class, all three or none."""
    task = plain.world().task
    assert CCVR(samples=0).survey_form(task) == {}
    form = CCVR().survey_form(task)
    assert sorted(form) == ["0", "1", "2"]
    assert {k: tuple(v.shape) for k, v in form["1"].items()} == {"1/n": (1,), "1/mean": (3,), "1/cov": (3, 3)}
