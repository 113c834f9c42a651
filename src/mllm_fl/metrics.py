"""Measurements: accuracy overall, per class, per group and per client, calibration, forgetting; and how a curve becomes one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_fl.data.longtail import Groups

SCORES = ("accuracy", "class_weighted", "per_class", "many", "medium", "few", "ece")
"""What :meth:`Evaluation.scores` names; a round that was not evaluated has None for each."""


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


BINS = 15
_UNIT = 2**32  # confidences are summed as whole multiples of 1/_UNIT: equal sums in whatever order batches are added


@dataclass(frozen=True)
class Calibration:
    """Predictions by confidence: int64 (bins,) each of how many, how many right, and the sum of confidences in units of 2^-32. Addable.

    Bin i of ``bins`` equally wide ones holds confidences in (i / bins, (i + 1) / bins]; a confidence is the softmax of the predicted class.
    """

    images: Tensor
    right: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, y: Tensor, logits: Tensor, bins: int = BINS) -> Calibration:
        """From true labels (n,) and logits (n, C); a logit that is not finite counts as no confidence."""
        share, predicted = torch.softmax(logits.double(), 1).nan_to_num(0.0).max(1)
        place = (torch.ceil(share * bins).long() - 1).clamp(0, bins - 1)
        units = torch.round(share * _UNIT).long()
        zero = torch.zeros(bins, dtype=torch.int64, device=logits.device)
        added = (zero.index_add(0, place, v) for v in (torch.ones_like(place), (predicted == y).long(), units))
        return cls(*(v.cpu() for v in added))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.images + other.images, self.right + other.right, self.confidence + other.confidence)

    def ece(self) -> float | None:
        """Expected calibration error, sum_b n_b / n |accuracy_b - mean confidence_b| (Guo et al. 2017, arXiv:1706.04599, eq. 3); None without images."""
        n = int(self.images.sum())
        if n == 0:
            return None
        return float((self.right.double() - self.confidence.double() / _UNIT).abs().sum()) / n


@dataclass(frozen=True)
class Evaluation:
    """All that one pass over the test images measures. Addable over batches, workers and sites."""

    confusion: Confusion
    calibration: Calibration

    @classmethod
    def of(cls, y: Tensor, logits: Tensor) -> Evaluation:
        """From true labels (n,) and logits (n, C)."""
        found = Confusion.of(y, logits.argmax(1), logits.shape[1])
        return cls(Confusion(found.counts.cpu()), Calibration.of(y, logits))

    @classmethod
    def none(cls, classes: int) -> Evaluation:
        """Of no images: what sums begin with."""
        return cls.of(torch.zeros(0, dtype=torch.int64), torch.zeros(0, classes))

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.confusion + other.confusion, self.calibration + other.calibration)

    @property
    def counts(self) -> Tensor:
        """The confusion matrix, int64 (C, C)."""
        return self.confusion.counts

    def scores(self, groups: Groups | None) -> dict[str, Any]:
        """The accuracies of :meth:`Confusion.scores`, and ``ece`` over 15 equally wide bins of confidence."""
        return self.confusion.scores(groups) | {"ece": self.calibration.ece()}


def per_client(per_class: Sequence[float | None], histograms: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What one model is worth to each client, were its test images distributed like its training images, a_k = sum_c (n_kc / n_k) a_c.

    The model is the one that is deployed to all; a_c is its accuracy on the test images of class c, ``histograms`` n_kc the clients' images by class. A
    class without test images stays out of both sums. ``worst_decile``: mean over the ceil(K / 10) worst clients. A client
    without images of a tested class is None in ``each`` and stays out of the means.
    """
    each: list[float | None] = []
    for held in histograms:
        known = [(n, a) for n, a in zip(held, per_class, strict=True) if a is not None]
        total = sum(n for n, _ in known)
        each.append(sum(n * a for n, a in known) / total if total else None)
    ranked = sorted(a for a in each if a is not None)
    return {"mean": _mean(each), "worst_decile": _mean(ranked[: math.ceil(len(ranked) / 10)]), "each": each}


def forgetting(history: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """How far each class is below the best it has been: max over the evaluated rounds minus the last of them, per class and on average.

    ``history``: class accuracies of the evaluated rounds, in order. Never negative (Chaudhry et al. 2018, arXiv:1801.10112, eq. 3,
    leaves the last round out of the maximum and can be). None for a class that was never tested.
    """
    lost: list[float | None] = []
    for column in zip(*history, strict=True):
        known = [a for a in column if a is not None]
        lost.append(max(known) - column[-1] if known and column[-1] is not None else None)
    return {"mean": _mean(lost), "per_class": lost}


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
