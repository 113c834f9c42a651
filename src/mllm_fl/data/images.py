"""A set of labelled images, in memory or decoded on demand: the only form in which images travel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Pair = tuple[np.ndarray, np.ndarray]
"""One image twice, uint8 (3, height, width): as it is stored, and as it is used; the same object where nothing was resized."""


class Pixels(Protocol):
    """Where the pixels of N images come from."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at these positions: uint8, shape (n, 3, height, width)."""
        ...

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        """Each image as it is stored, decoded but neither resized nor cut, and as :meth:`read` gives it: what a leak is looked for in."""
        ...


@dataclass(frozen=True)
class MemoryPixels:
    """Pixels that lie in memory: ``tensor`` is uint8, shape (N, 3, height, width).

    ``native``: the same images before they were resized, uint8 (N, 3, height, width); None where they were not.
    """

    tensor: Tensor
    native: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tensor)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.tensor[torch.as_tensor(np.asarray(indices, dtype=np.int64))]

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        for i in indices:
            used = self.tensor[i].numpy()
            yield (used if self.native is None else self.native[i]), used


@dataclass(frozen=True)
class Selected:
    """Some of another's pixels, by position."""

    pixels: Pixels
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.pixels.read(self.positions[np.asarray(indices, dtype=np.int64)].tolist())

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        return self.pixels.pairs(self.positions[np.asarray(indices, dtype=np.int64)].tolist())


@dataclass(frozen=True)
class Joined:
    """Several pixels of one size, one after another."""

    parts: tuple[Pixels, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, indices: Sequence[int]) -> Tensor:
        positions = np.asarray(indices, dtype=np.int64)
        out, start = torch.empty(0, dtype=torch.uint8), 0
        for part in self.parts:
            here = np.flatnonzero((positions >= start) & (positions < start + len(part)))
            if len(here) or not len(positions):
                found = part.read((positions[here] - start).tolist())
                out = out if len(out) else torch.empty((len(positions), *found.shape[1:]), dtype=torch.uint8)
                out[torch.from_numpy(here)] = found
            start += len(part)
        return out

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        for i in indices:
            for part in self.parts:
                if i < len(part):
                    yield from part.pairs([i])
                    break
                i -= len(part)


@dataclass(frozen=True)
class ImageSet:
    """N labelled images.

    ``labels`` is int64 of shape (N,), values in ``range(len(class_names))``; an unlabelled set has -1.
    ``mean`` and ``std`` are the per-channel normalisation constants on the 0..1 scale.
    """

    name: str
    pixels: Pixels
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at these positions: uint8, shape (n, 3, height, width)."""
        return self.pixels.read(indices)

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        """See :meth:`Pixels.pairs`."""
        return self.pixels.pairs(indices)

    def normalised(self, indices: Sequence[int]) -> Tensor:
        """The images at these positions: float32, shape (n, 3, height, width), (x/255 - mean) / std."""
        mean = torch.tensor(self.mean).view(1, 3, 1, 1)
        std = torch.tensor(self.std).view(1, 3, 1, 1)
        return (self.read(indices).float().div_(255.0).sub_(mean)).div_(std)

    def subset(self, indices: Sequence[int], name: str | None = None) -> ImageSet:
        """The images at these positions, as a set of its own; pixels are not copied."""
        positions = np.asarray(indices, dtype=np.int64)
        return ImageSet(
            name or self.name,
            Selected(self.pixels, positions),
            self.labels[positions],
            self.class_names,
            self.mean,
            self.std,
        )

    def class_counts(self) -> list[int]:
        """Number of images of each class."""
        return [int(n) for n in np.bincount(self.labels, minlength=len(self.class_names))]

    def hashes(self) -> list[str]:
        """SHA-256 of each image's pixels and shape as they are used, in order."""
        out = []
        for i in range(len(self)):
            x = self.read([i])[0].contiguous().numpy()
            out.append(hashlib.sha256(repr(x.shape).encode() + x.tobytes()).hexdigest())
        return out
