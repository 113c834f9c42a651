"""FedBE (arXiv:2009.01974, Algorithm 1, and its released code) in NumPy: sampled models, sharpened mean, SGD with momentum, averaged steps."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import Server, Update
from mllm_fl.algorithms.fedbe import FedBE, sampled
from mllm_fl.losses import ensemble_kl, sharpened
from mllm_fl.seeds import stream


def sample(w: plain.W, clients: list[plain.W], scale: float, noise: plain.W) -> plain.W:
    """w^t + r (mu + scale sigma eps), tensor by tensor."""
    out = {}
    for k in w:
        moves = [c[k] - w[k] for c in clients]
        norms = [np.sqrt((d**2).sum()) for d in moves]
        units = [d / n for d, n in zip(moves, norms, strict=True)]
        mu = sum(units) / len(units)
        sigma = np.sqrt(np.maximum(sum(u**2 for u in units) / len(units) - mu**2, 1e-5))
        out[k] = w[k] + np.mean(norms) * (mu + scale * sigma * noise[k])
    return out


@pytest.mark.parametrize(("size", "t"), [(1000, 1), (5, 4)])
def test_server_step_in_numpy(size: int, t: int) -> None:
    """Round ``t`` is the server's state after t - 1 rounds; noise and the order of images are what its named streams hand out."""
    world, steps, every, lr = plain.world(("unlabelled",)), 9, 2, 0.3
    assert world.task.unlabelled is not None
    m, _ = plain.seen(world.task.unlabelled)
    sent, images, start = plain.moved(world.w, [0.5, 1.5, 2.0]), [16.0, 11.0, 7.0], plain.of(world.w)
    clients = [plain.of(s) for s in sent]
    average = plain.mean(images, clients)
    draws = world.task.stream("posterior", t)
    models = [average]
    for _ in range(3):
        noise = {k: torch.randn(v.shape, generator=draws).double().numpy() for k, v in start.items()}
        models.append(sample(start, clients, 0.4, noise))
    q = np.mean([plain.softmax(plain.logits(v, m)) for v in [*models, *clients]], 0) ** 3.0
    q = q / q.sum(1, keepdims=True)

    draws = world.task.stream("distil", t)
    order = [b.numpy() for _ in range(steps) for b in torch.randperm(len(m), generator=draws).split(size)]

    def loss(v: plain.W, b: plain.Array) -> float:
        gap = q[b] * (np.log(q[b]) - plain.log_softmax(plain.logits(v, m[b])))
        return float(gap.mean())  # over elements: 1/C of the batch mean

    w, speed, late = average, {k: 0 * v for k, v in start.items()}, []
    for i in range(1, steps + 1):
        g = plain.slope(partial(loss, b=order[i - 1]), w)
        speed = {k: 0.9 * speed[k] + g[k] + 1e-5 * w[k] for k in w}
        w = {k: w[k] - lr * speed[k] for k in w}
        if i in (6, 8, 9):  # after half of the steps, every second one, and the last
            late.append(w)
    method = FedBE(steps=steps, batch_size=size, lr=lr, samples=3, variance=0.4, sharpen=3.0, average_every=every)
    updates = [Update(k, s, n, {}, {}) for k, (s, n) in enumerate(zip(sent, images, strict=True))]
    got = method.server(world.task, Server(world.w, round=t - 1), iter(updates)).w
    plain.near(got, plain.mean([1, 1, 1], late))


def test_without_spread_every_sample_is_the_client() -> None:
    world = plain.world()
    client = plain.moved(world.w, [0.7])[0]
    got = sampled(world.w, [client, client], world.task.trainable, 0.1, stream(0, "x"))
    assert all(torch.allclose(got[k], client[k], atol=1e-6) for k in got)
    unlike = plain.moved(world.w, [0.7, 0.3])
    got = sampled(world.w, unlike, world.task.trainable, 0.0, stream(0, "x"))
    noise = {k: np.zeros(v.shape) for k, v in world.w.items()}
    plain.near(got, sample(plain.of(world.w), [plain.of(c) for c in unlike], 0.0, noise))


def test_a_tensor_that_nobody_moved_stays() -> None:
    world = plain.world()
    client = {k: v.clone() if k == "scale" else v + 1 for k, v in world.w.items()}
    got = sampled(world.w, [client, client], world.task.trainable, 0.1, stream(0, "x"))
    assert torch.equal(got["scale"], world.w["scale"])
    one = {**client, "classifier.bias": world.w["classifier.bias"]}
    got = sampled(world.w, [client, one], world.task.trainable, 0.1, stream(0, "x"))
    assert all(bool(torch.isfinite(v).all()) for v in got.values())


def test_the_spread_has_a_floor_where_clients_differ() -> None:
    """Two clients that went the same way, one further: the directions agree, and the variance of a direction is 1e-5 at least."""
    world = plain.world()
    one = plain.moved(world.w, [0.5])[0]
    models = [one, {k: world.w[k] + 2 * (one[k] - world.w[k]) for k in one}]
    draws = stream(0, "x")
    noise = {k: torch.randn(v.shape, generator=draws).double().numpy() for k, v in world.w.items()}
    got = sampled(world.w, models, world.task.trainable, 100.0, stream(0, "x"))
    plain.near(got, sample(plain.of(world.w), [plain.of(v) for v in models], 100.0, noise), 1e-3)


def test_the_spread_is_what_it_is_drawn_from() -> None:
    """Two clients on opposite sides in one entry: mu 0, sigma 1, r 2, so draws scatter by 2 * 0.1."""
    anchor = {"w": torch.zeros(1)}
    models = [{"w": torch.tensor([2.0])}, {"w": torch.tensor([-2.0])}]
    draws = stream(0, "x")
    values = torch.stack([sampled(anchor, models, ["w"], 0.1, draws)["w"] for _ in range(1500)])
    assert float(values.std()) == pytest.approx(0.2, rel=0.05)
    assert float(values.mean()) == pytest.approx(0.0, abs=0.02)


def test_sharpening_and_divergence_by_hand() -> None:
    """(1/4, 3/4) squared is 1 : 9. Exponent 1 changes nothing. KL((1, 0) || (1/2, 1/2)) = log 2."""
    p = torch.tensor([[0.25, 0.75]])
    assert torch.allclose(sharpened(p, 2.0), torch.tensor([[0.1, 0.9]]))
    assert torch.allclose(sharpened(p, 1.0), p)
    got = ensemble_kl(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.zeros(2, 2))
    assert float(got) == pytest.approx(np.log(2) / 2)
