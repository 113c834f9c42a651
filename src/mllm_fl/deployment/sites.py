"""The sites of a federation: the file that binds their keys to their names, and the federation that their own images make."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_fl.atomic import write_atomic
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet, Pair
from mllm_fl.data.manifest import Manifest, sha256_of
from mllm_fl.data.sources import Splits
from mllm_fl.engines.reception import Site
from mllm_fl.errors import UserError
from mllm_fl.runs import read_json


def read_sites(path: Path) -> list[Site]:
    """``sites.json``: ``{"sites": [{"name", "node"}, ...]}`` in client order.

    Raises:
        UserError: missing, broken, or one name or node twice.
    """
    try:
        sites = [
            Site(str(s["name"]), int(s["node"]) if s.get("node") is not None else None)
            for s in read_json(path)["sites"]
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(path, f"lacks or garbles {e}", "write it again with `mllm-fl deploy register`") from e
    if not sites:
        raise UserError(path, "names no site", "add one with `mllm-fl deploy init`")
    for values in ([s.name for s in sites], [s.node for s in sites if s.node is not None]):
        if len(set(values)) != len(values):
            raise UserError(path, "names a site or a node twice", "correct it")
    return sites


def write_sites(path: Path, sites: Sequence[Site]) -> None:
    """The file that :func:`read_sites` reads. Numbers of nodes are text: they do not fit a double."""
    rows = [{"name": s.name, "node": None if s.node is None else str(s.node)} for s in sites]
    write_atomic(path, (json.dumps({"sites": rows}, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Absent:
    """Pixels that are on another machine; what is read here are stand-ins, all zero, of the right shape."""

    count: int
    size: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.zeros(len(indices), 3, self.size, self.size, dtype=torch.uint8)

    def pairs(self, indices: Sequence[int]) -> Any:
        blank = np.zeros((3, self.size, self.size), dtype=np.uint8)
        pair: Pair = (blank, blank)
        return iter([pair] * len(indices))


@dataclass(frozen=True)
class SitesFederation(Federation):
    """A federation whose training images are at the sites. ``train`` are the server's own: all of them are left over."""

    histograms: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        server: Splits,
        names: Sequence[str],
        sizes: Mapping[str, int],
        histograms: Mapping[str, Sequence[int]],
        config: DataConfig,
    ) -> SitesFederation:
        """From what the sites said. Class counts are the sum of the histograms where all sites share theirs, else zeros: unknown."""
        held = [int(sizes[str(k)]) for k in range(len(names))]
        classes = len(server.train.class_names)
        shared = [histograms[str(k)] for k in range(len(names)) if str(k) in histograms]
        counts = [sum(column) for column in zip(*shared, strict=True)] if len(shared) == len(names) else [0] * classes
        ends = np.cumsum([0, *held]).tolist()
        clients = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))
        manifest = Manifest(
            dataset=f"{len(names)} sites",
            fingerprint=sha256_of([list(names), held]),
            images=sum(held),
            class_names=server.train.class_names,
            imbalance_factor=1,
            achieved_imbalance=max(counts) / min(n for n in counts if n) if any(counts) else 1,
            partition="sites",
            alpha=config.alpha,
            min_size=0,
            seed=config.seed,
            class_counts=tuple(counts),
            subset_sha256=sha256_of([list(names), held]),
            clients=clients,
        )
        return cls(
            server.train,
            server.test,
            manifest,
            None,
            tuple(tuple(int(n) for n in histograms.get(str(k), [0] * classes)) for k in range(len(names))),
        )

    def client(self, k: int) -> ImageSet:
        n, size = len(self.manifest.clients[k]), int(self.test.read([0]).shape[-1])
        labels = np.zeros(n, dtype=np.int64)
        return ImageSet(f"site {k}", Absent(n, size), labels, self.class_names, self.train.mean, self.train.std)

    def histogram(self, k: int) -> list[int]:
        """Images of each class at site k, if it shares that; else zeros."""
        return list(self.histograms[k])

    @property
    def subset(self) -> ImageSet:  # type: ignore[override]
        """None of the clients' images are here."""
        return self.train.subset([], "the sites' images, which are not here")

    @property
    def leftover(self) -> ImageSet:  # type: ignore[override]
        """All of the server's own training images."""
        return self.train.subset(list(range(len(self.train))), f"{self.train.name} leftover")

    @property
    def held(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros(len(self.train), dtype=bool)
