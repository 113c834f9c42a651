"""Federated learning in NumPy, for oracles: a linear model, full-batch descent, gradients by finite differences. Knows nothing of the package.

Model: feature = scale * (mean of each colour), logits = weight feature + bias; 3 + 3 C + C numbers, float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_fl.conformance import toy
from mllm_fl.conformance.toy import World
from mllm_fl.engines.local import LocalConfig
from mllm_fl.trees import Tree, clone

Array = Any  # a float64 array
W = dict[str, Array]
NAMES = ("scale", "classifier.weight", "classifier.bias")
LR, STEPS = 0.5, 4
LOCAL = LocalConfig(epochs=STEPS, batch_size=1000, lr=LR, augment="none")
"""A batch holds all images of a client, so that their order does not matter: STEPS steps of descent at LR."""


class Linear(nn.Module):
    """The same model in torch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 1.3, 0.8]))
        self.classifier = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.scale * x.mean((2, 3))
        return feature, self.classifier(feature)


def world(needs: Sequence[str] = (), classes: int = 3, sizes: Sequence[int] = (16, 11, 7)) -> World:
    """The suite's toy clients and server sets, under the linear model."""
    full = toy.world(needs, classes=classes, sizes=sizes)
    net = Linear(classes)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        net.classifier.weight.copy_(torch.from_numpy(rng.normal(0, 0.7, (classes, 3))))
        net.classifier.bias.copy_(torch.from_numpy(rng.normal(0, 0.3, classes)))
    return replace(full, task=replace(full.task, net=net), w=clone(net.state_dict()))


def seen(images: Any) -> tuple[Array, Array]:
    """(mean colours (n, 3), labels (n,)) of an image set."""
    x = images.normalised(range(len(images))).double().numpy()
    return x.mean((2, 3)), np.asarray(images.labels)


def of(tree: Tree) -> W:
    """The tree in float64."""
    return {k: tree[k].double().numpy().copy() for k in NAMES}


def logits(w: W, m: Array) -> Array:
    """(n, C)."""
    return (m * w["scale"]) @ w["classifier.weight"].T + w["classifier.bias"]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def ce(z: Array, y: Array) -> float:
    """Mean of -log p_y."""
    return float(-np.mean([row[c] for row, c in zip(log_softmax(z), y, strict=True)]))


def on(loss: Callable[..., float], m: Array, y: Array, *more: Array | float) -> Callable[[W], float]:
    """``loss(logits, y, *more)`` on these images, as a function of the weights."""
    return lambda w: loss(logits(w, m), y, *more)


def slope(loss: Callable[[W], float], w: W, names: Sequence[str] = NAMES) -> W:
    """The gradient of ``loss`` at ``w`` by central differences, error about 1e-9."""
    out = {}
    for k in names:
        g = np.zeros_like(w[k])
        for i in np.ndindex(g.shape):
            up, down = ({**w, k: w[k].copy()} for _ in range(2))
            up[k][i] += 1e-5
            down[k][i] -= 1e-5
            g[i] = (loss(up) - loss(down)) / 2e-5
        out[k] = g
    return out


def descend(loss: Callable[[W], float], w: W, steps: int = STEPS, lr: float = LR) -> W:
    """Plain gradient descent."""
    for _ in range(steps):
        g = slope(loss, w)
        w = {k: w[k] - lr * g[k] for k in w}
    return w


def mean(weights: Sequence[float], trees: Sequence[W]) -> W:
    """sum_k p_k w_k, p_k = weight_k / sum."""
    total = sum(weights)
    return {k: sum(p / total * t[k] for p, t in zip(weights, trees, strict=True)) for k in trees[0]}


def near(got: Tree, expected: W, tolerance: float = 2e-5) -> None:
    """Equal up to float32's rounding over a few dozen steps."""
    for k in expected:
        gap = float(np.abs(got[k].double().numpy() - expected[k]).max())
        assert gap < tolerance * max(1.0, float(np.abs(expected[k]).max())), f"{k}: {gap}"


def moved(w: Tree, by: Sequence[float]) -> list[Tree]:
    """Weights of clients that differ in every entry, without training: the k-th is w + by_k * a pattern of its own."""
    out = []
    for k, size in enumerate(by):
        rng = np.random.default_rng(100 + k)
        out.append({n: v + size * torch.from_numpy(rng.normal(0, 1, tuple(v.shape))).float() for n, v in w.items()})
    return out
