"""Gradient matching on federated features and prototype contrast: the pure functions behind CReFF and CLIP2FL.

Shang, Lu, Huang, Wang: Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated
Features, 2022, arXiv:2204.13399 (CReFF). Shi, Zheng, Yin, Lu, Xie, Qu: CLIP-Guided Federated Learning on Heterogeneous and
Long-Tailed Data, 2024, arXiv:2312.08648 (CLIP2FL).

A head is a linear classifier: ``weight`` (C, d) and ``bias`` (C,), z = W f + b, p = softmax(z). Every gradient here is
written out, so that nothing is differentiated twice. All functions take tensors, return tensors and change none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.trees import Tree


class Answer(Protocol):
    """Anything with named tensors beside weights: an update."""

    @property
    def extra(self) -> Tree: ...


U = TypeVar("U", bound=Answer)
Sums = dict[str, tuple[int, Tensor]]
"""Name of a leaf -> how many clients sent it, and their sum in float64."""
EPS = 1e-6
"""Added to the product of norms in each cosine, as CReFF's code does: D is scale-free only where gradients are not tiny."""


def head_gradient(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the mean cross-entropy of a head, with respect to its weight (C, d) and its bias (C,).

    grad_W = 1/n sum_i (p_i - e_{y_i}) f_i^T,   grad_b = 1/n sum_i (p_i - e_{y_i}).   ``features`` (n, d), ``labels`` (n,).
    """
    residual = torch.softmax(F.linear(features, weight, bias), 1) - F.one_hot(labels, len(bias))
    return residual.T @ features / len(labels), residual.mean(0)


def gradient_distance(weight_a: Tensor, bias_a: Tensor, weight_b: Tensor, bias_b: Tensor) -> Tensor:
    """D(a, b) = sum_j (1 - cos(a_j, b_j)) over the C rows of the weight gradients and the bias gradient as one row more.

    CReFF's matching loss, cos(u, v) = u.v / (||u|| ||v|| + 1e-6); D lies in [0, 2 (C + 1)]. Weights (..., C, d), biases
    (..., C); leading dimensions are classes whose gradients are compared at a time. Shape (...).
    """
    return (1 - _cosine(weight_a, weight_b)).sum(-1) + (1 - _cosine(bias_a, bias_b))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (_norm(a) * _norm(b) + EPS).squeeze(-1)


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    return norm


def _minus_cosine_slope(a: Tensor, b: Tensor) -> Tensor:
    """Gradient of 1 - cos(a, b) with respect to a, row by row; at a = 0 that of the norm is taken as 0. Shape of a."""
    norm_a, norm_b = _norm(a), _norm(b)
    product = norm_a * norm_b + EPS
    along = (a * b).sum(-1, keepdim=True) * norm_b / (product.square() * norm_a.clamp_min(1e-12))
    return (a * along).addcmul_(b, 1 / product, value=-1)


def matching_gradient(
    features: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, target_weight: Tensor, target_bias: Tensor
) -> Tensor:
    """Gradient of sum_c D(head_gradient(features_c, c), target_c) with respect to the features. Shape (S, n, d).

    ``features`` (S, n, d): n of each of S classes; ``classes`` (S,); targets (S, C, d) and (S, C). With R = (P - E) / n the
    residuals, G = R^T F and A = dD/dG, the two ways from F to D add up: dD/dF = R A + dZ W, where dR = F A^T + 1 a_b^T is
    D's gradient along n R, and dZ = P * (dR - rowsum(P * dR)) / n.
    """
    count, n, d = features.shape
    p = torch.softmax(torch.addmm(bias, features.reshape(-1, d), weight.T), 1).view(count, n, -1)
    residual = p / n
    residual[torch.arange(count, device=p.device), :, classes] -= 1 / n
    slope_w = _minus_cosine_slope(residual.mT @ features, target_weight)
    slope_b = _minus_cosine_slope(residual.sum(1), target_bias)
    d_residual = torch.baddbmm(slope_b[:, None], features, slope_w.mT)
    d_logits = p * d_residual.sub_((p * d_residual).sum(2, keepdim=True))
    return torch.baddbmm(d_logits @ (weight / n), residual, slope_w)


def feature_match(
    features: Tensor,
    labels: Tensor,
    seen: Tensor,
    grad_weights: Tensor,
    grad_biases: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    steps: int = 100,
    lr: float = 0.1,
    pull: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The features after ``steps`` of SGD on sum_{c seen} D(head_gradient(features_c, c), g_c), plus what pulls at all. (N, d).

    ``features`` (N, d) with ``labels`` (N,), as many of each seen class; ``seen`` (S,) the classes with a received gradient,
    ``grad_weights`` (S, C, d), ``grad_biases`` (S, C); ``weight``, ``bias``: the head under which the clients took them.
    ``pull(features, labels)``: gradient (N, d) of a further loss on all features (CLIP2FL's contrast); without it the features of
    unseen classes stay. All classes move in one batched tensor program; a class's features answer to its own gradient alone.
    """
    of_class = torch.stack([(labels == c).nonzero().flatten() for c in seen])  # (S, n)
    others = (labels[:, None] != seen).all(1).nonzero().flatten()
    order = torch.cat([of_class.flatten(), others])
    moved, moved_labels = features[order], labels[order]
    mine = moved[: of_class.numel()].view(*of_class.shape, -1)  # a view: both lines below move the same memory
    for _ in range(steps):
        pulled = pull(moved, moved_labels) if pull else None
        mine.sub_(matching_gradient(mine, seen, weight, bias, grad_weights, grad_biases), alpha=lr)
        if pulled is not None:
            moved.sub_(pulled, alpha=lr)
    return torch.empty_like(features).index_copy_(0, order, moved)


def fresh_head(like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random head as torch's Linear starts, uniform in +- 1/sqrt(d): a weight like ``like`` (C, d) and a bias (C,)."""
    classes, width = like.shape
    drawn = (2 * torch.rand(classes, width + 1, generator=generator) - 1).to(like) / math.sqrt(width)
    return drawn[:, :width].clone(), drawn[:, width].clone()


def retrain_head(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, generator: torch.Generator, *,
    epochs: int = 300, lr: float = 0.01, batch: int = 32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A head after plain SGD on the mean cross-entropy of ``features`` (N, d), ``labels`` (N,), from ``weight``, ``bias``.

    Each epoch is a fresh permutation of all N from ``generator`` (on the CPU); the last partial batch is kept. A step is written out:
    R = P - E, W <- W - lr/b R^T F, b <- b - lr/b sum R.
    """
    targets = F.one_hot(labels, len(bias)).to(features.dtype)
    weight, bias = weight.clone(), bias.clone()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for x, y in zip(features[order].split(batch), targets[order].split(batch), strict=True):
            residual = torch.softmax(torch.addmm(bias, x, weight.T), 1).sub_(y)
            weight.addmm_(residual.T, x, alpha=-lr / len(x))
            bias.sub_(residual.sum(0), alpha=lr / len(x))
    return weight, bias


def prototype_contrast(
    features: Tensor, labels: Tensor, texts: Tensor, temperature: float = 0.1, copies: int = 100
) -> Tensor:
    """CLIP2FL's prototype contrastive loss between features (N, d) and unit text embeddings (C, d), in closed form. Shape ().

    mean_i -[ s_{iy} - log( (M - 1) e^{s_{iy}} + M sum_{c != y} e^{s_{ic}} ) ],  s_{ic} = f_i . t_c / temperature, M = ``copies``.

    It equals the supervised contrastive loss of f_i against every text repeated M times, with the pair (i, i) masked out: of
    the M - 1 positives all have the same term. Features are not normalised, as in their code.
    """
    scores = features @ texts.T / temperature
    own = scores.gather(1, labels[:, None]).squeeze(1)
    return (torch.logsumexp(scores + _log_copies(labels, len(texts), copies, scores), 1) - own).mean()


def prototype_contrast_gradient(
    features: Tensor, labels: Tensor, texts: Tensor, temperature: float = 0.1, copies: int = 100
) -> Tensor:
    """Gradient of :func:`prototype_contrast` with respect to the features: (q - e_y) T / (N temperature). Shape (N, d).

    q_i = softmax over classes of s_{ic} + log m_{ic}, with m = M - 1 for the own class and M for the others.
    """
    scores = features @ texts.T / temperature
    q = torch.softmax(scores + _log_copies(labels, len(texts), copies, scores), 1)
    return (q - F.one_hot(labels, len(texts))) @ texts / (len(labels) * temperature)


def _log_copies(labels: Tensor, classes: int, copies: int, like: Tensor) -> Tensor:
    return torch.log((copies - F.one_hot(labels, classes)).to(like.dtype))


@torch.no_grad()
def class_gradients(
    labels: Tensor,
    feature_of: Callable[[list[int], torch.Generator], Tensor],
    stream: Callable[[str], torch.Generator],
    weight: Tensor,
    bias: Tensor,
    repeats: int = 10,
    images: int = 32,
) -> Tree:
    """What a client answers about each class c it holds: ``grad/c/weight`` (C, d) and ``grad/c/bias`` (C,), float32.

    The mean over ``repeats`` of :func:`head_gradient` on at most ``images`` random images of the class, without replacement;
    ``feature_of(positions, generator)`` gives their features (n, d), augmented by draws from the generator. Streams are named by
    class ("query/c", "dsa/c"), so that a class's answer does not depend on which others are there.
    """
    found: Tree = {}
    for c in labels.unique().tolist():
        members, picks, draws = (labels == c).nonzero().flatten(), stream(f"query/{c}"), stream(f"dsa/{c}")
        answers = []
        for _ in range(repeats):
            chosen = members[torch.randperm(len(members), generator=picks)[:images]]
            feature = feature_of(chosen.tolist(), draws)
            answers.append(head_gradient(feature, labels.new_full((len(chosen),), c).to(feature.device), weight, bias))
        found[f"grad/{c}/weight"] = torch.stack([w for w, _ in answers]).mean(0)
        found[f"grad/{c}/bias"] = torch.stack([b for _, b in answers]).mean(0)
    return found


def gradient_form(weight: Tensor, bias: Tensor) -> dict[str, Tree]:
    """What :func:`class_gradients` answers under a head: for each class, both leaves or none. {class: leaves}, without values."""
    leaves = {"weight": weight.to("meta"), "bias": bias.to("meta")}
    return {f"{c}": {f"grad/{c}/{leaf}": v for leaf, v in leaves.items()} for c in range(len(bias))}


def gathering(updates: Iterable[U], sums: Sums) -> Iterator[U]:
    """The updates as they pass, their gradients added up in ``sums`` (in place), so that memory does not grow with the clients."""
    for u in updates:
        for k, g in u.extra.items():
            clients, total = sums.get(k, (0, torch.zeros_like(g, dtype=torch.float64)))
            sums[k] = clients + 1, total + g.double()
        yield u


def mean_gradients(sums: Sums, classes: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(seen (S,), weight gradients (S, C, d), bias gradients (S, C)): plain means over clients; None if no class was seen.

    Unweighted, as in CReFF's code: a client with one image of a class counts as much as one with a thousand.
    """
    seen = [c for c in range(classes) if f"grad/{c}/weight" in sums]
    if not seen:
        return None
    means = {k: (v / n).float() for k, (n, v) in sums.items()}
    weights, biases = (torch.stack([means[f"grad/{c}/{leaf}"] for c in seen]) for leaf in ("weight", "bias"))
    return torch.tensor(seen, device=weights.device), weights, biases


def fresh_state(like: Tensor, per_class: int, features: torch.Generator, head: torch.Generator) -> Tree:
    """What the server keeps, at its start: "features" (C * per_class, d) from N(0, 1), and a random "head/weight" and "head/bias".

    ``like``: the classifier's weight (C, d); rows of features are sorted by class.
    """
    drawn = torch.randn(per_class * len(like), like.shape[1], generator=features).to(like)
    weight, bias = fresh_head(like, head)
    return {"features": drawn, "head/weight": weight, "head/bias": bias}


def match_and_retrain(
    kept: Tree,
    sums: Sums,
    draws: torch.Generator,
    *,
    match_steps: int = 100,
    match_lr: float = 0.1,
    head_epochs: int = 300,
    head_lr: float = 0.01,
    head_batch: int = 32,
    pull: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tree:
    """What the server keeps after a round: features matched to the clients' mean gradients, then a new head trained on all of them.

    ``kept`` as from :func:`fresh_state`; ``sums`` as from :func:`gathering`. The head that the clients used is the one the features
    are matched under; the new one starts afresh from ``draws``, which then also draws its batches.
    """
    features, weight, bias = kept["features"], kept["head/weight"], kept["head/bias"]
    labels = torch.arange(len(bias), device=bias.device).repeat_interleave(len(features) // len(bias))
    means = mean_gradients(sums, len(bias))
    if means is not None:
        features = feature_match(features, labels, *means, weight, bias, steps=match_steps, lr=match_lr, pull=pull)
    fresh = fresh_head(weight, draws)
    weight, bias = retrain_head(features, labels, *fresh, draws, epochs=head_epochs, lr=head_lr, batch=head_batch)
    return {"features": features, "head/weight": weight, "head/bias": bias}
