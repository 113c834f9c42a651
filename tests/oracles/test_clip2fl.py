"""CLIP2FL's two losses and a server step in plain NumPy, from arXiv:2312.08648 (eq. 1 and 8) and the code's numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tests import toy

from mllm_fl.algorithms.base import Broadcast, Update
from mllm_fl.algorithms.clip2fl import CLIP2FL
from mllm_fl.trees import Tree

Array = NDArray[np.float64]


def log_softmax(z: Array) -> Array:
    z = z - z.max(1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))


def test_the_clients_loss() -> None:
    """Eq. (1) on the network's own logits: mean over images of -log p_y + alpha T^2 sum_c q_c (log q_c - log p_c), both at T."""
    task, w = toy.task(toy.federation())
    images = toy.images(3)
    x, y = images.normalised(range(9)), torch.from_numpy(images.labels)
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    copy = {k: v.clone() for k, v in w.items()}  # a pass in training mode moves BatchNorm's buffers
    z, t = task.forward(copy, x)[1].detach().double().numpy(), rows.double().numpy()
    log_q, log_p = log_softmax(t / 2), log_softmax(z / 2)
    wanted = -log_softmax(z)[np.arange(9), images.labels].mean()
    wanted += 0.7 * 4 * (np.exp(log_q) * (log_q - log_p)).sum(1).mean()
    mine: Tree = {"each/teacher": rows}
    got = CLIP2FL(alpha=0.7, temperature=2.0).objective(task, dict(w), Broadcast(w, {}), mine, x, y)
    assert float(got) == pytest.approx(wanted, abs=1e-5)


def contrast(f: Array, labels: Array, texts: Array, tau: float, copies: int) -> float:
    """The supervised contrastive loss written out: every text ``copies`` times, row i of them masked out for feature i."""
    repeated, owner = np.repeat(texts, copies, 0), np.repeat(np.arange(len(texts)), copies)
    total = 0.0
    for i in range(len(f)):
        s = repeated @ f[i] / tau
        kept = np.arange(len(s)) != i
        log_p = s - np.log(np.exp(s[kept]).sum())
        total -= log_p[kept & (owner == labels[i])].mean()
    return total / len(f)


def loss(f: Array, labels: Array, texts: Array, targets: dict[int, Array], w: Array, b: Array) -> float:
    """Eq. (8) with lambda 0.3 and temperature 0.5."""
    total = 0.3 * contrast(f, labels, texts, 0.5, 3)
    for c, target in targets.items():
        own = f[labels == c]
        r = np.exp(log_softmax(own @ w.T + b))
        r[:, c] -= 1
        g = r.T @ np.hstack([own, np.ones((len(own), 1))]) / len(own)
        for p, q in [*zip(g[:, :-1], target[:, :-1], strict=True), (g[:, -1], target[:, -1])]:
            total += 1 - p @ q / (np.linalg.norm(p) * np.linalg.norm(q) + 1e-6)
    return total


def test_the_features_after_a_round() -> None:
    """Three SGD steps by central differences; class 1 is unseen and moves by the contrast alone."""
    task, w0 = toy.task(toy.federation())
    texts = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    task = dataclasses.replace(task, texts=texts)
    method = CLIP2FL(
        features=3, match_steps=3, match_lr=0.5, contrast=0.3, contrast_temperature=0.5, head_epochs=1, alpha=0.0
    )
    start, rng = method.init(task, w0), np.random.RandomState(0)
    targets = {0: rng.randn(3, 9), 2: rng.randn(3, 9)}
    extra = {f"grad/{c}/{leaf}": torch.from_numpy(part).float()
             for c, g in targets.items() for leaf, part in (("weight", g[:, :-1]), ("bias", g[:, -1]))}  # fmt: skip
    ended = method.server(task, start, [Update(0, w0, 1.0, extra, {})]).extra["features"].numpy()

    w, b, f = (start.extra[k].double().numpy().copy() for k in ("head/weight", "head/bias", "features"))
    labels, first = np.repeat([0, 1, 2], 3), f.copy()
    for _ in range(3):
        slope = np.zeros_like(f)
        for i in np.ndindex(*f.shape):
            up, down = f.copy(), f.copy()
            up[i] += 1e-6
            down[i] -= 1e-6
            args = labels, texts.double().numpy(), targets, w, b
            slope[i] = (loss(up, *args) - loss(down, *args)) / 2e-6
        f -= 0.5 * slope
    assert np.allclose(ended, f, atol=1e-4)
    assert not np.allclose(f[3:6], first[3:6], atol=1e-2)
