"""Perceptual near-duplicates among very many pictures: imagehash's pHash, and a second look at colours.

Two hashes of 64 bits that differ in at most r bits agree in at least one of r + 1 bands of them (pigeonhole), so only pictures that share a band
are compared: time grows with the number of look-alikes, not with the square of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from mllm_fl.errors import UserError

RADIUS = 4  # bits of 64
COLOUR = 10.0  # largest mean absolute difference of their 8 x 8 RGB thumbnails, of 255 levels
SPOT = 40  # largest difference of one value of these: a small thing at another place is another picture
_BITS = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Look:
    """What is remembered of a picture: its pHash (64 bits) and its RGB thumbnail, uint8 (192,)."""

    bits: int
    thumbnail: np.ndarray


def look(picture: Image.Image) -> Look:
    """The look of an RGB picture.

    Raises:
        UserError: imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError:
        raise UserError("near-duplicates", "need the package imagehash", "pip install 'mllm-fl[quality]'") from None
    bits = imagehash.phash(picture, hash_size=8).hash
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.uint8).reshape(-1)
    return Look(int.from_bytes(np.packbits(bits).tobytes(), "big"), small)


def near_pairs(looks: list[Look], radius: int = RADIUS, block: int = 256) -> list[tuple[int, int, int]]:
    """(i, j, bits that differ) of all pairs i < j that look alike, sorted."""
    if not looks:
        return []
    bits = np.array([x.bits for x in looks], dtype=np.uint64)
    thumbnails = np.stack([x.thumbnail for x in looks]).astype(np.int16)
    found: dict[tuple[int, int], int] = {}
    for group in _groups(bits, radius):
        for start in range(0, len(group), block):
            rows, columns = group[start : start + block], group[start:]
            distance = _popcount(bits[rows][:, None] ^ bits[columns][None])
            for a, b in np.argwhere(distance <= radius):
                i, j = int(rows[a]), int(columns[b])
                if i < j and (i, j) not in found:
                    apart = np.abs(thumbnails[i] - thumbnails[j])
                    if apart.mean() <= COLOUR and apart.max() <= SPOT:
                        found[i, j] = int(distance[a, b])
    return sorted((i, j, d) for (i, j), d in found.items())


def _groups(bits: np.ndarray, radius: int) -> Iterator[np.ndarray]:
    """Positions (ascending) that share one of radius + 1 bands."""
    edges = np.linspace(0, 64, radius + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        key = (bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(key, kind="stable")
        cuts = np.flatnonzero(np.diff(key[order])) + 1
        yield from (g for g in np.split(order, cuts) if len(g) > 1)


def _popcount(x: np.ndarray) -> np.ndarray:
    """Set bits of each uint64, int."""
    counted: np.ndarray = _BITS[np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, 8)].sum(-1, dtype=np.int64)
    return counted
