"""One federation: training images, their long tail, who holds them, the test images, and what is left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mllm_fl.data import manifest as manifests
from mllm_fl.data.config import DataConfig
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import achieved_imbalance, long_tail
from mllm_fl.data.manifest import Manifest
from mllm_fl.data.partition import partition
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError

__all__ = ["DataConfig", "Federation", "build"]


@dataclass(frozen=True)
class Federation:
    """``train`` is the whole training set; ``manifest`` says which of its images each client holds.

    ``spare``: the unheld images that are at hand, None for all of them; a pack carries only some.
    """

    train: ImageSet
    test: ImageSet
    manifest: Manifest
    spare: tuple[int, ...] | None = None

    @cached_property
    def clients(self) -> Sequence[Sequence[int]]:
        """Sorted indices into ``train``, one list per client."""
        return [list(indices) for indices in self.manifest.clients]

    @property
    def population(self) -> Sequence[int]:
        """Images of each client."""
        return tuple(map(len, self.manifest.clients))

    @cached_property
    def held(self) -> np.ndarray:
        """Which training images some client holds, bool (N,)."""
        held = np.zeros(len(self.train), dtype=bool)
        held[[i for indices in self.manifest.clients for i in indices]] = True
        return held

    def client(self, k: int) -> ImageSet:
        """The images of client k."""
        return self.train.subset(self.manifest.clients[k], f"{self.train.name} client {k}")

    def histogram(self, k: int) -> list[int]:
        """Images of each class that client k holds."""
        held = self.train.labels[list(self.manifest.clients[k])]
        return [int(n) for n in np.bincount(held, minlength=len(self.class_names))]

    @cached_property
    def subset(self) -> ImageSet:
        """The long-tailed training images: those of all clients together, in ascending order."""
        return self.train.subset(np.flatnonzero(self.held).tolist(), f"{self.train.name} long tail")

    @cached_property
    def leftover(self) -> ImageSet:
        """Training images that no client holds; the largest class has none when the long tail keeps it whole."""
        if self.spare is not None:
            return self.train.subset(self.spare, f"{self.train.name} leftover")
        return self.train.subset(np.flatnonzero(~self.held).tolist(), f"{self.train.name} leftover")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in label order."""
        return self.train.class_names

    @property
    def class_counts(self) -> list[int]:
        """Images per class that the clients hold together."""
        return list(self.manifest.class_counts)


def build(config: DataConfig) -> Federation:
    """The federation that a configuration describes; the same configuration and data give the same manifest."""
    if config.source.startswith("pack:"):
        from mllm_fl.data.pack import load_pack

        packed = load_pack(config.source.removeprefix("pack:"), config.image_size)
        _refuse_contradiction(config, packed.manifest, config.source)
        return packed
    train, test = load_source(config)
    if config.partition == "virtual":
        from mllm_fl.data.virtual import virtual

        return virtual(config, train, test)
    if config.manifest is not None:
        manifest = manifests.load(config.manifest)
        if manifest.partition == "virtual":
            raise UserError(config.manifest, "names virtual clients by a rule", "repeat its keys in [data] instead")
        manifests.verify(manifest, train, config.manifest)
        _refuse_contradiction(config, manifest, config.manifest)
        return Federation(train, test, manifest)
    return Federation(train, test, make_manifest(config, train))


def make_manifest(config: DataConfig, train: ImageSet) -> Manifest:
    """Cut the long tail, split it over the clients, and write down how."""
    classes = len(train.class_names)
    kept = long_tail(train.labels, classes, config.imbalance_factor, config.seed)
    clients = partition(
        kept,
        how=config.partition,
        clients=config.clients,
        alpha=config.alpha,
        seed=config.seed,
        min_size=config.min_size,
    )
    counts = tuple(map(len, kept))
    return Manifest(
        dataset=train.name,
        fingerprint=manifests.fingerprint(train),
        images=len(train),
        class_names=train.class_names,
        imbalance_factor=config.imbalance_factor,
        achieved_imbalance=achieved_imbalance(counts),
        partition=config.partition,
        alpha=config.alpha,
        min_size=config.min_size,
        seed=config.seed,
        class_counts=counts,
        subset_sha256=manifests.subset_sha256(kept),
        clients=tuple(tuple(sorted(indices)) for indices in clients),
    )


def _refuse_contradiction(config: DataConfig, manifest: Manifest, place: object) -> None:
    """A saved manifest decides; a key that was set to something else is a contradiction, a key left at its default is not."""
    default = DataConfig()
    for key, saved in (
        ("imbalance_factor", manifest.imbalance_factor),
        ("partition", manifest.partition),
        ("alpha", manifest.alpha),
        ("clients", len(manifest.clients)),
        ("seed", manifest.seed),
        ("min_size", manifest.min_size),
    ):
        asked = getattr(config, key)
        if asked not in (saved, getattr(default, key)):
            raise UserError(
                f"data.{key}", f"{asked!r} contradicts {saved!r} in {place}", f"remove data.{key} or the manifest"
            )
