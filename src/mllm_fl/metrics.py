"""Measurements: accuracy overall, per class and per group; and how a curve over rounds becomes one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_fl.data.longtail import Groups


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix: ``counts`` int64 (C, C), rows = true class, columns = prediction. Addable."""

    counts: Tensor

    @classmethod
    def of(cls, y: Tensor, predicted: Tensor, classes: int) -> Confusion:
        """From true and predicted labels, both (n,)."""
        return cls(torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def scores(self, groups: Groups | None) -> dict[str, Any]:
        """Accuracies as fractions: ``accuracy`` (over images), ``class_weighted``, ``per_class``, one per group.

        A class without test images has per-class accuracy None and stays out of the means; a group without such
        a class is None. Group accuracy is the unweighted mean of its classes' accuracies (ImageNet-LT's rule).
        """
        right = self.counts.diagonal().double()
        n = self.counts.sum(1).double()
        per_class = [float(r / m) if m > 0 else None for r, m in zip(right, n, strict=True)]
        out: dict[str, Any] = {
            "accuracy": float(right.sum() / n.sum()) if n.sum() > 0 else None,
            "class_weighted": _mean(per_class),
            "per_class": per_class,
        }
        for name in ("many", "medium", "few"):
            out[name] = _mean([per_class[c] for c in getattr(groups, name, ())])
        return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def summarise(curve: Sequence[tuple[int, float]], *, last: int = 20, decay: float = 0.6) -> dict[str, Any]:
    """All the accuracies one run can be quoted with, from (round, accuracy) pairs of the evaluated rounds.

    ``mean_last``: mean and sample standard deviation over the evaluated rounds among the last ``last`` rounds.
    ``max``: the best round; it was chosen on test data, and says so. ``ema``: exponential moving average,
    e <- decay * e + (1 - decay) * accuracy, from the first evaluated round on.
    """
    if not curve:
        return {"mean_last": None, "max": None, "ema": None}
    final = max(r for r, _ in curve)
    tail = [a for r, a in curve if r > final - last]
    mean = sum(tail) / len(tail)
    sd = math.sqrt(sum((a - mean) ** 2 for a in tail) / (len(tail) - 1)) if len(tail) > 1 else None
    ema = curve[0][1]
    for _, a in curve[1:]:
        ema = decay * ema + (1 - decay) * a
    best_round, best = max(curve, key=lambda p: (p[1], -p[0]))
    return {
        "mean_last": {"rounds": last, "n": len(tail), "mean": mean, "sd": sd},
        "max": {"accuracy": best, "round": best_round, "note": "selected on test"},
        "ema": {"decay": decay, "accuracy": ema},
    }
