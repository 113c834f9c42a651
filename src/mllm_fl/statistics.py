"""Statistics of features, heads and weights, as pure functions of tensors, each with its equation and source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def moments(features: Tensor) -> tuple[int, Tensor, Tensor]:
    """(n, mean (d,), unbiased covariance (d, d)) of features (n, d), in float64; the covariance of fewer than two is zero."""
    x = features.double()
    n = len(x)
    mean = x.mean(0) if n else torch.zeros(x.shape[1], dtype=torch.float64)
    centred = x - mean
    return n, mean, centred.T @ centred / max(n - 1, 1)


def pooled_moments(parts: Iterable[tuple[int, Tensor, Tensor]]) -> tuple[int, Tensor, Tensor]:
    """The moments of the union from the moments (n_k, mean_k, unbiased covariance_k) of its parts, exactly.

    CCVR (Luo et al. 2021, arXiv:2106.05001) eq. (4)-(5):
        mean = sum_k n_k mean_k / N,
        cov  = [ sum_k (n_k - 1) cov_k + sum_k n_k (mean_k - mean)(mean_k - mean)^T ] / (N - 1),
    the paper's form with the means' outer products expanded; written centred it loses no digits. Parts with n_k = 0 are
    passed over, one image has covariance zero, N = 1 gives covariance zero. Float64.

    Raises:
        ValueError: no part has an image.
    """
    held = [(n, m.double(), c.double()) for n, m, c in parts if n > 0]
    if not held:
        raise ValueError("pooled_moments: no part has an image")
    total = sum(n for n, _, _ in held)
    mean = torch.stack([n * m for n, m, _ in held]).sum(0) / total
    scatter = torch.stack([(n - 1) * c + n * torch.outer(m - mean, m - mean) for n, m, c in held]).sum(0)
    return total, mean, scatter / max(total - 1, 1)


def gaussian(mean: Tensor, covariance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws (count, d) from N(mean, covariance), float64; a singular or slightly indefinite covariance is fine.

    mean + V sqrt(max(lambda, 0)) eps over the eigenvectors V: no Cholesky factor to fail, no jitter that moves the moments.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    draws: Tensor = mean + noise @ root.T
    return draws


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """w_c / ||w_c||^tau for every row of a classifier's weight (C, d): Kang et al. 2020 (arXiv:1910.09217) eq. (3).

    tau 0 returns the weight itself; a row of zeros stays zero.
    """
    if tau == 0:
        return weight
    norms = weight.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, weight / norms.clamp_min(torch.finfo(weight.dtype).tiny) ** tau, weight)


def ratio_weights(
    changes: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    dominance: float = 0.8,
    empty: float = 10.0,
    cap: float = 5000.0,
) -> Tensor:
    """Class weights (C,) of the ratio loss from the head's weight changes (C, ...), one slice a class trained alone.

    Wang, Xu, Wang, Zhu 2021 (arXiv:2008.06217), its monitor: an entry of the head speaks for class c when c's change is
    the largest and no other class has |change| > ``dominance`` times it. R_c = |sum of these changes| / |sum over the same entries of
    the other classes' mean change|, ``empty`` when the denominator is 0, at most ``cap``; weight = alpha + beta R_c.
    """
    classes = len(changes)
    d = changes.reshape(classes, -1).double()
    top, owner = d.max(0)
    others = d.abs().scatter(0, owner[None], 0).max(0).values
    speaks = others <= dominance * top  # never where top < 0; where all are 0 it adds nothing
    weights = []
    for c in range(classes):
        mine = speaks & (owner == c)
        mean_rest = (d[:, mine].sum(0) - d[c, mine]) / max(classes - 1, 1)
        below = float(mean_rest.sum().abs())
        ratio = empty if below == 0 else min(float(d[c, mine].sum().abs()) / below, cap)
        weights.append(alpha + beta * ratio)
    return torch.tensor(weights, dtype=torch.float32)


def effective_numbers(features: Tensor, y: Tensor, classes: int, batches: Sequence[Tensor]) -> Tensor:
    """How much a client's images of each class differ from one another: (C,), FedYoYo (arXiv:2503.06916), its data-effective weights.

    Within a batch, with f^ the unit vector from the class mean to a feature, a class with n >= 2 images counts 1 / (a^T R a),
    R_ij = f^_i . f^_j, a = 1/n, that is 1 / ||mean f^||^2, and one image counts 1; summed over ``batches`` (index tensors).
    The denominator is at least 1e-6, theirs too.
    """
    totals = torch.zeros(classes, device=features.device)
    sums = torch.zeros(classes, features.shape[1], device=features.device).index_add_(0, y, features)
    means = sums / torch.bincount(y, minlength=classes).clamp_min(1)[:, None]
    unit = F.normalize(features - means[y])
    for batch in (b.to(y.device) for b in batches):
        for c in y[batch].unique().tolist():
            mine = unit[batch[y[batch] == c]]
            totals[c] += 1.0 if len(mine) == 1 else 1.0 / max(float(mine.mean(0).square().sum()), 1e-6)
    return totals
