"""One round of CReFF's client answer and server step in plain NumPy, from arXiv:2204.13399 (Algorithm 1, eq. 3-6) and the code's numbers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from tests import toy

from mllm_fl.algorithms.base import Server, Shard, Update
from mllm_fl.algorithms.creff import CReFF
from mllm_fl.engines.local import LocalConfig, train_client

Array = NDArray[np.float64]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def head_gradient(f: Array, c: int, w: Array, b: Array) -> Array:
    """(C, d + 1): the gradient of the mean cross-entropy, the bias last."""
    r = softmax(f @ w.T + b)
    r[:, c] -= 1
    return np.asarray(r.T @ np.hstack([f, np.ones((len(f), 1))]) / len(f))


def distance(g: Array, t: Array) -> float:
    rows = [(g[j, :-1], t[j, :-1]) for j in range(len(g))] + [(g[:, -1], t[:, -1])]
    return float(sum(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6) for a, b in rows))


def slope(f: Array, c: int, w: Array, b: Array, target: Array, h: float = 1e-6) -> Array:
    """dD/df by central differences."""
    out = np.zeros_like(f)
    for i in np.ndindex(*f.shape):
        up, down = f.copy(), f.copy()
        up[i] += h
        down[i] -= h
        out[i] = (distance(head_gradient(up, c, w, b), target) - distance(head_gradient(down, c, w, b), target)) / (
            2 * h
        )
    return out


def test_a_round_of_the_server() -> None:
    method = CReFF(features=3, match_steps=4, match_lr=0.3, head_epochs=2, head_lr=0.2, head_batch=4)
    task, w0 = toy.task(toy.federation())
    rng = np.random.RandomState(0)
    start = method.init(task, w0)
    h_w, h_b = (start.extra[k].double().numpy() for k in ("head/weight", "head/bias"))
    features = start.extra["features"].double().numpy().copy()

    # two clients: the first holds classes 0 and 2, the second class 2 alone
    held = [{0: rng.randn(3, 9), 2: rng.randn(3, 9)}, {2: rng.randn(3, 9)}]
    updates = [
        Update(k, {n: v + k for n, v in w0.items()}, 1.0 + k,
               {f"grad/{c}/{leaf}": torch.from_numpy(part).float()
                for c, g in own.items() for leaf, part in (("weight", g[:, :-1]), ("bias", g[:, -1]))}, {})
        for k, own in enumerate(held)
    ]  # fmt: skip
    ended = method.server(task, start, updates)

    targets = {0: held[0][0], 2: (held[0][2] + held[1][2]) / 2}
    for _ in range(4):
        for c, target in targets.items():
            block = slice(3 * c, 3 * c + 3)
            features[block] -= 0.3 * slope(features[block], c, h_w, h_b, target)
    assert np.allclose(ended.extra["features"].numpy(), features, atol=1e-4)

    draws = task.stream("head", 1)
    fresh = (2 * torch.rand(3, 9, generator=draws) - 1).double().numpy() / np.sqrt(8)
    w, b, labels = fresh[:, :-1], fresh[:, -1], np.repeat([0, 1, 2], 3)
    for _ in range(2):
        order = torch.randperm(9, generator=draws).numpy()
        for at in (order[:4], order[4:8], order[8:]):
            r = softmax(features[at] @ w.T + b)
            r[np.arange(len(at)), labels[at]] -= 1
            w, b = w - 0.2 * r.T @ features[at] / len(at), b - 0.2 * r.mean(0)
    assert np.allclose(ended.extra["head/weight"].numpy(), w, atol=1e-4)
    assert np.allclose(ended.extra["head/bias"].numpy(), b, atol=1e-4)

    mean = w0["backbone.conv.weight"].double().numpy() + 2 / 3  # (1 * w + 2 * (w + 1)) / 3
    assert np.allclose(ended.w["backbone.conv.weight"].numpy(), mean, atol=1e-6)
    assert np.array_equal(method.deploy(task, ended)["classifier.bias"].numpy(), ended.extra["head/bias"].numpy())


def test_a_clients_answer() -> None:
    """Three draws of two images of each class, from the streams query/c; no augmentation."""
    method = CReFF(features=3, repeats=3, images=2, dsa=False)
    task, w0 = toy.task(toy.federation())
    images, start = toy.images(4), method.init(task, w0)
    shard = Shard(5, 1, images, task.seed)
    local = LocalConfig(epochs=1, batch_size=8, lr=0.05)
    update, _ = train_client(task, method, method.broadcast(Server(w0, start.extra)), {}, shard, local)
    w, b = (start.extra[k].double().numpy() for k in ("head/weight", "head/bias"))
    with torch.no_grad():
        f = task.forward(w0, shard.x(range(12)), train=False)[0].double().numpy()
    for c in range(3):
        picks = shard.stream(f"query/{c}")
        drawn = [4 * c + torch.randperm(4, generator=picks)[:2].numpy() for _ in range(3)]
        wanted = np.mean([head_gradient(f[at], c, w, b) for at in drawn], axis=0)
        assert np.allclose(update.extra[f"grad/{c}/weight"].numpy(), wanted[:, :-1], atol=1e-5)
        assert np.allclose(update.extra[f"grad/{c}/bias"].numpy(), wanted[:, -1], atol=1e-5)
