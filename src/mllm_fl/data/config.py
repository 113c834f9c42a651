"""What federation to build: the ``[data]`` table of a TOML file."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_fl.data.partition import Partition
from mllm_fl.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """A labelled source, its long tail and its clients.

    ``source``: ``digits``, ``cifar10``, ``cifar100``, ``imagenet-lt``, ``folder:PATH``, ``hf:NAME`` or ``pack:PATH``.
    ``root``: folder or file of the source; absent means the environment variable MLLM_FL_DATA.
    ``imbalance_factor``: n_max / n_min to cut; 1 keeps every image. ``alpha``: Dirichlet concentration.
    ``partition``: ``creff``, ``dirichlet``, ``iid``, or ``virtual``: clients that nobody lists, up to millions (data/virtual.py).
    ``min_size``: smallest client that ``dirichlet`` may return, images; 0 allows empty clients in every partition but ``virtual``, whose
    clients all have this size.
    ``image_size``: pixels a side; absent means the source's own default.
    ``manifest``: a saved manifest that decides who holds what, instead of the keys above.
    ``leaks_declared``: test images that are known to be among the training images; more than these stop a run
    (CIFAR-10 has none, CIFAR-100 as published has 10 in its whole training set, 3 to 7 in the long tails we drew).
    """

    source: str = "digits"
    root: str | None = None
    imbalance_factor: float = 1
    partition: Partition = "creff"
    alpha: float = 0.5
    clients: int = 20
    seed: int = 7
    min_size: int = 10
    image_size: int | None = None
    manifest: str | None = None
    leaks_declared: int = 0

    def __post_init__(self) -> None:
        def refuse_unless(good: bool, key: str, problem: str, way_out: str) -> None:
            if not good:
                raise UserError(f"data.{key}", f"{getattr(self, key)!r} {problem}", way_out)

        refuse_unless(bool(self.source), "source", "names no data set", "use for example 'digits' or 'cifar10'")
        refuse_unless(
            1 <= self.imbalance_factor < float("inf"),
            "imbalance_factor",
            "is below 1 or not finite",
            "give n_max / n_min",
        )
        refuse_unless(
            self.partition in ("creff", "dirichlet", "iid", "virtual"),
            "partition",
            "is unknown",
            "use 'creff', 'dirichlet', 'iid' or 'virtual'",
        )
        refuse_unless(0 < self.alpha < float("inf"), "alpha", "is not a positive concentration", "use for example 0.5")
        refuse_unless(self.clients >= 1, "clients", "is below 1", "use at least one client")
        refuse_unless(0 <= self.seed < 2**32, "seed", "is outside 0 .. 2**32 - 1", "use for example 7")
        refuse_unless(self.min_size >= 0, "min_size", "is negative", "use 0 to allow empty clients")
        refuse_unless(
            self.image_size is None or 4 <= self.image_size <= 1024,
            "image_size",
            "is outside 4 .. 1024 pixels",
            "use for example 32",
        )
        refuse_unless(
            self.leaks_declared >= 0, "leaks_declared", "is negative", "use 0, or the number that `data check` reports"
        )
