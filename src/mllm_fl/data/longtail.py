"""Long-tailed class counts, the images that are kept, and the many / medium / few groups.

Protocol: Cao et al. 2019 (LDAM, arXiv:1906.07413) for the exponential profile; CReFF-FL (Shang et al. 2022,
arXiv:2204.13399) for the order of random draws, which we reproduce bit by bit for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_fl.errors import UserError


def class_counts(n_max: int, classes: int, imbalance: float) -> list[int]:
    """Images to keep per class, n_c = int(n_max * f**(c / (C - 1))) with f = 1 / imbalance, truncated; class 0 is largest."""
    if not imbalance >= 1:
        raise UserError(
            "data.imbalance_factor", f"{imbalance} is below 1", "give n_max / n_min, for example 100; 1 means no tail"
        )
    f = 1 / imbalance
    if classes == 1:
        return [n_max]
    counts = [int(n_max * f ** (c / (classes - 1.0))) for c in range(classes)]
    if counts[-1] == 0:
        raise UserError(
            "data.imbalance_factor",
            f"{imbalance:g} leaves the last class without an image ({n_max} in the largest)",
            f"use at most {n_max}",
        )
    return counts


def long_tail(labels: np.ndarray, classes: int, imbalance: float, seed: int) -> list[list[int]]:
    """The kept training indices, one list per class, each in the order in which it was drawn.

    One legacy stream, ``RandomState(seed)``, is used class after class: it gives the draws of ``np.random.seed(seed)``
    followed by ``np.random.shuffle`` of every class's ascending index list, without touching the global generator.
    n_max is the size of the smallest class (N / C for CIFAR), so that the requested imbalance can be reached whatever the
    source. ``imbalance`` 1 keeps every image: a source with a tail of its own stays as it is.
    """
    sizes = np.bincount(labels, minlength=classes)
    if sizes.min() == 0:
        raise UserError(
            "data.source", f"class {int(sizes.argmin())} has no training image", "remove the class or add images"
        )
    keep = sizes.tolist() if imbalance == 1 else class_counts(int(sizes.min()), classes, imbalance)
    random = np.random.RandomState(seed)
    kept = []
    for c in range(classes):
        indices: list[int] = np.flatnonzero(labels == c).tolist()
        random.shuffle(indices)  # a Python list, as in the reference: the legacy stream is consumed in the same way
        kept.append(indices[: keep[c]])
    return kept


def achieved_imbalance(counts: Sequence[int]) -> float:
    """Largest class count over the smallest that is not zero."""
    present = [n for n in counts if n > 0]
    return max(present) / min(present)


@dataclass(frozen=True)
class Groups:
    """Classes by training frequency: ``rule`` says in words how they were cut, the rest are class indices."""

    rule: str
    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]


def groups(class_counts: Sequence[int], rule: str = "auto") -> Groups:
    """Many / medium / few by the official ImageNet-LT thresholds, or by thirds of the classes by rank.

    ``"official"``: many n > 100, medium 20..100, few n < 20 (Liu et al. 2019, arXiv:1904.05160). ``"thirds"``: classes
    sorted by count, cut into three parts, the middle one taking the remainder. ``"auto"``: official when none of its
    groups is empty, else thirds. The returned ``rule`` is recorded with every result that uses the groups.
    """
    counts = list(class_counts)
    if not any(counts):  # sites that share no label histograms
        return Groups("unknown: nobody says how many training images a class has", (), (), ())
    if rule not in ("auto", "official", "thirds"):
        raise UserError("groups", f"unknown rule {rule!r}", "use 'auto', 'official' or 'thirds'")
    if rule != "thirds":
        many = tuple(c for c, n in enumerate(counts) if n > 100)
        medium = tuple(c for c, n in enumerate(counts) if 20 <= n <= 100)
        few = tuple(c for c, n in enumerate(counts) if n < 20)
        if rule == "official" or (many and medium and few):
            return Groups("official: many n > 100, medium 20..100, few n < 20 training images", many, medium, few)
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    third = len(order) // 3
    parts = [
        tuple(sorted(order[a:b]))
        for a, b in ((0, third), (third, len(order) - third), (len(order) - third, len(order)))
    ]
    return Groups("thirds of the classes by training count, the middle one takes the remainder", *parts)
