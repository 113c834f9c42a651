"""Who holds what: the training indices of every client.

``creff``: the split of CReFF-FL and CLIP2FL (Shang et al. 2022, arXiv:2204.13399), which is the Dirichlet routine of FedDF
(Lin et al. 2020, arXiv:2006.07242) followed by an equal re-cut. Written from the protocol, bit-equal to it for every seed.
``dirichlet``: plain per-class Dirichlet shares (Hsu et al. 2019, arXiv:1909.06335). ``iid``: shuffled, cut equally.
All take the kept indices class by class and return one list per client; together the lists are a partition of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream

Partition = Literal["creff", "dirichlet", "iid", "virtual"]
GROUP = 10  # auxiliary workers that one Dirichlet draw serves in FedDF's routine
TRIES = 10_000  # Dirichlet draws of a whole group before we give up; the reference loops for ever


def partition(
    kept: Sequence[Sequence[int]], *, how: Partition, clients: int, alpha: float, seed: int, min_size: int
) -> list[list[int]]:
    """Indices of every client, after a check of the arguments; ``min_size`` 0 allows empty clients."""
    total = sum(map(len, kept))
    if clients < 1:
        raise UserError("data.clients", f"{clients} clients", "use at least 1")
    if not alpha > 0 or not np.isfinite(alpha):
        raise UserError(
            "data.alpha", f"the Dirichlet concentration is {alpha}", "use a number above 0, for example 0.5"
        )
    if min_size < 0:
        raise UserError("data.min_size", f"{min_size} is negative", "use 0 to allow empty clients")
    if total < clients and min_size > 0:
        raise UserError(
            "data.clients",
            f"{total} training images cannot give {clients} clients one image each",
            "use fewer clients, a smaller data.imbalance_factor, or data.min_size = 0 to allow empty clients",
        )
    if how == "creff":
        return creff(kept, clients, alpha, seed)
    if how == "dirichlet":
        return dirichlet(kept, clients, alpha, seed, min_size)
    if how == "iid":
        return iid(kept, clients, seed)
    raise UserError("data.partition", f"unknown partition {how!r}", "use 'creff', 'dirichlet' or 'iid'")


def creff(kept: Sequence[Sequence[int]], clients: int, alpha: float, seed: int, tries: int = TRIES) -> list[list[int]]:
    """CReFF's split: equal client sizes, strong label skew.

    One legacy stream ``RandomState(seed)`` shuffles the list of all images, then gives every Dirichlet draw. The shuffled
    list is cut into groups of ten workers (the last group takes what remains of the clients and of the images, so 20
    clients are two groups of ten, 25 are 10 + 10 + 5, and fewer than ten are one group), each group is split by class,
    and the concatenation of all workers is re-cut into equal contiguous chunks. The reference asks for at least ten
    clients; one group of fewer workers is our extension.
    """
    random = np.random.RandomState(seed)
    pairs = [(index, label) for label, indices in enumerate(kept) for index in indices]
    random.shuffle(pairs)
    chain: list[int] = []
    start = 0
    for first in range(0, clients, GROUP):
        workers = min(GROUP, clients - first)
        last = first + workers >= clients
        stop = len(pairs) if last else start + int(GROUP / clients * len(pairs))
        for held in _group(random, pairs[start:stop], len(kept), workers, alpha, tries):
            chain += held
        start = stop
    return _equal_chunks(chain, clients)


def _group(
    random: np.random.RandomState, pairs: list[tuple[int, int]], classes: int, workers: int, alpha: float, tries: int
) -> list[list[int]]:
    """Split one group's images among its workers, repeated until the smallest holds half of an equal share."""
    by_class: list[list[int]] = [[] for _ in range(classes)]
    for index, label in pairs:
        by_class[label].append(index)
    share = len(pairs) / workers
    for _ in range(tries):
        held: list[list[int]] = [[] for _ in range(workers)]
        for indices in by_class:
            p = random.dirichlet(np.repeat(alpha, workers))  # one draw per class, also for a class with no image here
            p = np.array([q * (len(mine) < share) for q, mine in zip(p, held, strict=True)])
            for mine, part in zip(held, _cut(indices, p), strict=True):
                mine += part
        if min(map(len, held)) >= int(0.5 * len(pairs) / workers):
            return held
    raise UserError(
        "data.alpha",
        f"no split in {tries} draws gave each of {workers} workers half of an equal share (alpha {alpha:g}, {len(pairs)} images)",
        "raise data.alpha, use fewer clients, or data.partition = 'dirichlet' with a small data.min_size",
    )


def _cut(indices: list[int], p: np.ndarray) -> list[list[int]]:
    """Cut a list at int(cumsum(p / sum p) * n); the last part takes the rest, and everything if no share is positive."""
    total = p.sum()
    # The reference divides by zero here, and NaN cast to int gives edges that leave all to the last worker. Same result, said aloud.
    edges = (np.cumsum(p / total) * len(indices)).astype(int)[:-1].tolist() if total > 0 else [0] * (len(p) - 1)
    return [indices[a:b] for a, b in zip([0, *edges], [*edges, len(indices)], strict=True)]


def _equal_chunks(chain: list[int], parts: int) -> list[list[int]]:
    """Contiguous chunks whose sizes differ by at most one, the larger ones first."""
    size, rest = divmod(len(chain), parts)
    edges = np.cumsum([0] + [size + (k < rest) for k in range(parts)]).tolist()
    return [chain[a:b] for a, b in pairwise(edges)]


def dirichlet(
    kept: Sequence[Sequence[int]], clients: int, alpha: float, seed: int, min_size: int, tries: int = 1_000
) -> list[list[int]]:
    """Every class is cut by its own shares p ~ Dir(alpha * 1), redrawn until each client holds ``min_size`` images."""
    best = -1
    for attempt in range(tries):
        random = numpy_stream(seed, "dirichlet", attempt)
        held: list[list[int]] = [[] for _ in range(clients)]
        for indices in kept:
            p = np.nan_to_num(random.dirichlet(np.full(clients, alpha)))
            for mine, part in zip(
                held, _cut(random.permutation(np.asarray(indices, dtype=np.int64)).tolist(), p), strict=True
            ):
                mine += part
        best = max(best, min(map(len, held)))
        if best >= min_size:
            return held
    raise UserError(
        "data.min_size",
        f"no Dirichlet split in {tries} draws gave each of {clients} clients {min_size} images (alpha {alpha:g}; best {best})",
        f"lower data.min_size to {best}, raise data.alpha, or use fewer data.clients",
    )


def iid(kept: Sequence[Sequence[int]], clients: int, seed: int) -> list[list[int]]:
    """All kept images shuffled and cut into equal parts (sizes differ by at most one)."""
    everything = np.concatenate([np.asarray(indices, dtype=np.int64) for indices in kept])
    return _equal_chunks(numpy_stream(seed, "iid").permutation(everything).tolist(), clients)
