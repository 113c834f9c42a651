"""A population of any size that nobody lists: what a virtual client holds is computed from its number when it is asked for.

Client k draws its class shares p_k ~ Dirichlet(alpha C prior), its class counts from Multinomial(size, p_k), and so many different images of
each class (with repetition only where a class has fewer), all from the stream (data seed, "virtual client", k). Its expected shares are the
prior, which falls exponentially from class 0 to class C - 1 by the imbalance; with a uniform prior this is Dirichlet(alpha) of
equal concentrations. The tail is in how often a class is drawn: clients share images, so this is for measuring scale and heterogeneity, not for a
paper's table. Two federations of equal keys and training images are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, overload

import numpy as np

from mllm_fl.data import manifest as manifests
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.data.manifest import Manifest, sha256_of
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream

LISTED = 1000
"""Clients that stand for all where a table or a hash of each client is asked for: the first ones."""


class Repeated(Sequence[int]):
    """``times`` times the same number, without a list."""

    def __init__(self, value: int, times: int) -> None:
        self.value, self.times = value, times

    def __len__(self) -> int:
        return self.times

    @overload
    def __getitem__(self, k: int) -> int: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[int]: ...
    def __getitem__(self, k: int | slice) -> int | Sequence[int]:
        found = range(self.times)[k]
        return self.value if isinstance(found, int) else Repeated(self.value, len(found))


class VirtualClients(Sequence[tuple[int, ...]]):
    """``clients`` clients of ``size`` images each; item k is client k's sorted training positions.

    ``prior`` (C,) sums to one. ``labels`` of the training images: None for a rule that was read from a file and that can only be compared.
    """

    def __init__(
        self, clients: int, size: int, alpha: float, seed: int, prior: Sequence[float], labels: np.ndarray | None
    ) -> None:
        self.clients, self.size, self.alpha, self.seed = clients, size, alpha, seed
        self.prior = tuple(float(p) for p in prior)
        self._of_class = None if labels is None else [np.flatnonzero(labels == c) for c in range(len(self.prior))]

    @property
    def rule(self) -> dict[str, Any]:
        """All that decides who holds what, beside the training images."""
        return {
            "clients": self.clients,
            "size": self.size,
            "alpha": self.alpha,
            "seed": self.seed,
            "prior": list(self.prior),
        }

    def __len__(self) -> int:
        return self.clients

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualClients) and self.rule == other.rule

    def __hash__(self) -> int:
        return hash((self.clients, self.size, self.seed, self.prior))

    @overload
    def __getitem__(self, k: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[tuple[int, ...]]: ...
    def __getitem__(self, k: int | slice) -> tuple[int, ...] | Sequence[tuple[int, ...]]:
        found = range(self.clients)[k]
        return self._client(found) if isinstance(found, int) else [self._client(i) for i in found]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return (self._client(k) for k in range(self.clients))

    def _client(self, k: int) -> tuple[int, ...]:
        if self._of_class is None:
            raise UserError("manifest.json", "names virtual clients by a rule", "repeat its keys in [data]")
        random, prior = numpy_stream(self.seed, "virtual client", k), np.array(self.prior)
        p = np.nan_to_num(random.dirichlet(self.alpha * len(prior) * prior))
        p = p / p.sum() if p.sum() > 0 else np.eye(len(prior))[random.choice(len(prior), p=prior)]
        held: list[int] = []
        for of_class, n in zip(self._of_class, random.multinomial(self.size, p), strict=True):
            if n:
                held += random.choice(of_class, n, replace=bool(n > len(of_class))).tolist()
        return tuple(sorted(held))


@dataclass(frozen=True)
class VirtualManifest(Manifest):
    """A manifest that holds the rule in the place of the lists; ``client_sha256`` is of the first ``LISTED`` clients."""

    @property
    def listed(self) -> Sequence[tuple[int, ...]]:
        return self._virtual[:LISTED]

    @property
    def total(self) -> int:
        return self._virtual.clients * self._virtual.size

    @property
    def client_sha256(self) -> tuple[str, ...]:
        return tuple(sha256_of(list(indices)) for indices in self.listed)

    @cached_property
    def _content(self) -> dict[str, Any]:
        kept = {f.name: getattr(self, f.name) for f in fields(Manifest) if f.name != "clients"}
        return kept | {"clients": self._virtual.rule}

    @property
    def sha256(self) -> str:
        return sha256_of(self._content)

    @property
    def _virtual(self) -> VirtualClients:
        assert isinstance(self.clients, VirtualClients)
        return self.clients

    def to_json(self) -> dict[str, Any]:
        return {"format": manifests.FORMAT, "sha256": self.sha256, **self._content, "total": self.total}


class VirtualFederation(Federation):
    """A federation of virtual clients; every training image may be held by some, so none is left over."""

    @property
    def clients(self) -> Sequence[Sequence[int]]:  # type: ignore[override]
        return self.manifest.clients

    @property
    def population(self) -> Sequence[int]:
        found = self.manifest.clients
        assert isinstance(found, VirtualClients)
        return Repeated(found.size, found.clients)

    @cached_property
    def held(self) -> np.ndarray:
        return np.ones(len(self.train), dtype=bool)

    @cached_property
    def subset(self) -> ImageSet:
        return replace(self.train, name=f"{self.train.name}, all that virtual clients draw from")


def prior_of(labels: np.ndarray, classes: int, imbalance: float) -> np.ndarray:
    """Expected shares of the classes: those of the training images if ``imbalance`` is 1, else prior_c ~ imbalance^(-c / (C - 1))."""
    if imbalance == 1:
        shares = np.bincount(labels, minlength=classes).astype(float)
    else:
        shares = imbalance ** -(np.arange(classes) / max(classes - 1, 1))
    return np.asarray(shares / shares.sum())


def virtual(config: DataConfig, train: ImageSet, test: ImageSet) -> VirtualFederation:
    """The federation of ``data.clients`` virtual clients with ``data.min_size`` images each.

    Raises:
        UserError: no image a client, a class without a training image, or a saved manifest beside the keys.
    """
    if config.manifest is not None:
        raise UserError("data.manifest", "a virtual partition is described by its keys", "remove data.manifest")
    if config.min_size < 1:
        raise UserError("data.min_size", "0 images for each virtual client", "use for example 20")
    classes = len(train.class_names)
    if np.bincount(train.labels, minlength=classes).min() == 0:
        raise UserError("data.source", "a class has no training image", "remove the class or add images")
    prior = prior_of(train.labels, classes, config.imbalance_factor)
    counts = tuple(max(1, round(config.clients * config.min_size * p)) for p in prior.tolist())
    manifest = VirtualManifest(
        dataset=train.name,
        fingerprint=manifests.fingerprint(train),
        images=len(train),
        class_names=train.class_names,
        imbalance_factor=config.imbalance_factor,
        achieved_imbalance=max(counts) / min(counts),
        partition="virtual",
        alpha=config.alpha,
        min_size=config.min_size,
        seed=config.seed,
        class_counts=counts,
        subset_sha256=manifests.subset_sha256([np.flatnonzero(train.labels == c).tolist() for c in range(classes)]),
        clients=VirtualClients(
            config.clients, config.min_size, config.alpha, config.seed, prior.tolist(), train.labels
        ),
    )
    return VirtualFederation(train, test, manifest)


def parsed(values: dict[str, Any]) -> VirtualManifest:
    """The manifest in a file's values; its clients can be compared, not asked what they hold."""
    return VirtualManifest(**{**values, "clients": VirtualClients(**values["clients"], labels=None)})
