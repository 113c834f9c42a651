"""Broken, duplicate and nearly duplicate images, and images that stand in two sets at once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_fl.data.config import DataConfig
from mllm_fl.data.decode import EncodedPixels, FileContents, to_array, to_rgb
from mllm_fl.data.folder import TEST_NAMES, TRAIN_NAMES, all_images, image_files
from mllm_fl.data.images import ImageSet
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError

# Chosen on CIFAR-10, where they give 99 train-test pairs; looked at one by one, two were doubtful. Drawings on an empty
# ground, such as digits, are alike to so coarse a look: their near-duplicates are candidates, no more.
BITS = 8  # of the 64 of a difference hash that near-duplicates may differ in
GREY = 12  # largest mean absolute difference of their 16 x 16 grey thumbnails, of 255 levels
EXAMPLES = 20  # of each kind that a report names


@dataclass(frozen=True)
class SetReport:
    """One set: how many images, which are broken, which classes have one image, groups of equal and pairs of similar ones."""

    name: str
    role: str
    images: int
    broken: list[tuple[str, str]] = field(default_factory=list)
    single_image_classes: list[str] = field(default_factory=list)
    duplicates: int = 0
    duplicate_examples: list[list[str]] = field(default_factory=list)
    near_duplicates: int = 0
    near_examples: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Overlap:
    """Images of set ``a`` that stand in set ``b`` too: with equal pixels, or nearly equal ones."""

    a: str
    b: str
    exact: int
    near: int
    examples: list[list[str]]


@dataclass(frozen=True)
class Report:
    """What was found; ``leaks`` counts images outside the test sets whose pixels are those of a test image."""

    sets: list[SetReport]
    overlaps: list[Overlap]
    leaks: int

    @property
    def clean(self) -> bool:
        """No broken image and no leak; duplicates are reported, not condemned."""
        return self.leaks == 0 and not any(s.broken for s in self.sets)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "clean": self.clean}

    def text(self) -> str:
        """As plain text, one finding a line."""
        lines = []
        for s in self.sets:
            lines.append(
                f"{s.name} [{s.role}]: {s.images:,} images, {len(s.broken)} broken, {s.duplicates} duplicates, "
                f"{s.near_duplicates} near-duplicates"
            )
            lines += [f"  broken {place}: {reason}" for place, reason in s.broken[:EXAMPLES]]
            lines += [f"  class {name!r} has one image" for name in s.single_image_classes[:EXAMPLES]]
            lines += [f"  equal {' = '.join(group)}" for group in s.duplicate_examples[:5]]
            lines += [f"  near  {' ~ '.join(pair)}" for pair in s.near_examples[:5]]
        for o in self.overlaps:
            lines.append(f"{o.a} in {o.b}: {o.exact} equal, {o.near} near")
            lines += [f"  {' ~ '.join(pair)}" for pair in o.examples[:5]]
        return "\n".join([*lines, f"leaks into test sets: {self.leaks}"])


Prints = tuple[str, str]
"""SHA-256 of one image as it is stored, and as it is used."""


def leaks(a: ImageSet | Iterable[Prints], test: ImageSet | frozenset[str]) -> int:
    """Number of images of ``a`` (or of what :func:`prints` says of them) that are some image of ``test``: equal size and values.

    ``test`` may be given as what :func:`known` says of it, when several sets are held against one.

    Both are looked at as they are stored and as they are used, so two sets that read one file at different sizes, or with different cuts,
    are told to share it. As stored is: of files, Parquet columns and hub sets the decoded picture, upright and in RGB; of CIFAR 32 x 32; of
    digits and rendered characters the 8 x 8 counts before they are scaled up; of a pack what was packed, which is what its maker used.
    A picture that was resized and saved again, cut, mirrored or recoloured is another one to this check; see :func:`check`.
    """
    there = known(test) if isinstance(test, ImageSet) else test
    found = prints(a) if isinstance(a, ImageSet) else a
    return sum(stored in there or used in there for stored, used in found)


def known(test: ImageSet) -> frozenset[str]:
    """All hashes of a set, as stored and as used."""
    return frozenset(digest for both in prints(test) for digest in both)


def prints(images: ImageSet) -> Iterator[Prints]:
    """The hashes of every image, as it is stored and as it is used."""
    return (prints_of(stored, used) for stored, used in images.pairs(range(len(images))))


def prints_of(stored: np.ndarray, used: np.ndarray) -> Prints:
    """The hashes of one image given twice, each uint8 (3, height, width)."""
    first = _digest(stored)
    return first, first if used is stored else _digest(used)


def _digest(x: np.ndarray) -> str:
    return hashlib.sha256(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes()).hexdigest()


def pixel_hashes(images: ImageSet) -> list[str]:
    """``images.hashes()``, read in batches."""
    out = []
    for start in range(0, len(images), 512):
        batch = images.read(range(start, min(start + 512, len(images)))).contiguous().numpy()
        head = repr(batch.shape[1:]).encode()
        out += [hashlib.sha256(head + x.tobytes()).hexdigest() for x in batch]
    return out


def check(sources: Sequence[str], root: str | None = None) -> Report:
    """Look at every image of these sources, named as in the ``[data]`` table, or ``open:PATH`` for unlabelled images.

    Broken images are listed, never raised. Near-duplicates: difference hashes (8 x 8) that differ in at most 8 bits and
    grey thumbnails that differ by at most 12 levels on average; mirrored or recoloured copies escape. All pairs are compared, so time grows with the square of the
    number of images (CIFAR-10's 60,000: 18 s on one core).
    """
    return check_sets([found for source in sources for found in _sets(source, root)])


def check_sets(sets: Sequence[tuple[str, ImageSet]]) -> Report:
    """The same for sets at hand: pairs of a role (``train``, ``open``, ``align``, ``test``) and an image set."""
    prints = [_fingerprints(images) for _, images in sets]
    edges = np.cumsum([0, *[len(p.places) for p in prints]])
    near = _near_pairs(np.concatenate([p.bits for p in prints]), np.concatenate([p.grey for p in prints]))
    owner = np.searchsorted(edges, near, side="right") - 1
    places = [place for p in prints for place in p.places]
    digests = [digest for p in prints for digest in p.digests]
    different = np.array([digests[i] != digests[j] for i, j in near.tolist()], dtype=bool)

    reports, overlaps, leaked = [], [], set()
    for k, ((role, images), p) in enumerate(zip(sets, prints, strict=True)):
        groups: dict[str, list[str]] = defaultdict(list)
        for digest, place in zip(p.digests, p.places, strict=True):
            groups[digest].append(place)
        equal = [group for group in groups.values() if len(group) > 1]
        similar = near[(owner == k).all(1) & different]
        reports.append(
            SetReport(
                name=images.name,
                role=role,
                images=len(images),
                broken=p.broken,
                single_image_classes=[n for n, c in zip(images.class_names, _counts(images), strict=True) if c == 1],
                duplicates=sum(len(group) - 1 for group in equal),
                duplicate_examples=equal[:EXAMPLES],
                near_duplicates=len(similar),
                near_examples=[[places[i], places[j]] for i, j in similar[:EXAMPLES].tolist()],
            )
        )
        for other in range(k):
            known: dict[str, str] = dict(zip(prints[other].digests, prints[other].places, strict=True))
            shared = [(place, known[d]) for d, place in zip(p.digests, p.places, strict=True) if d in known]
            crossing = near[(owner[:, 0] == other) & (owner[:, 1] == k) & different]
            examples = [list(pair) for pair in shared] + [[places[j], places[i]] for i, j in crossing.tolist()]
            overlaps.append(Overlap(images.name, sets[other][1].name, len(shared), len(crossing), examples[:EXAMPLES]))
        if role != "test":
            known_tests = {d for (r, _), q in zip(sets, prints, strict=True) if r == "test" for d in q.digests}
            leaked |= {(k, i) for i, d in enumerate(p.digests) if d in known_tests}
    return Report(reports, overlaps, len(leaked))


def _counts(images: ImageSet) -> list[int]:
    return images.class_counts() if len(images.labels) and images.labels.min() >= 0 else [0] * len(images.class_names)


@dataclass
class _Prints:
    """Per readable image: its place, SHA-256, difference hash (bool, 64) and grey thumbnail (uint8, 256)."""

    places: list[str]
    digests: list[str]
    bits: np.ndarray
    grey: np.ndarray
    broken: list[tuple[str, str]]


def _fingerprints(images: ImageSet) -> _Prints:
    places, digests, broken = [], [], []
    bits, grey = [np.zeros((0, 64), dtype=bool)], [np.zeros((0, 256), dtype=np.uint8)]
    for place, image, digest in _pictures(images):
        if isinstance(image, str):
            broken.append((place, image))
            continue
        places.append(place)
        digests.append(digest)
        flat = image.convert("L")
        small = np.asarray(flat.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
        bits.append((small[:, 1:] > small[:, :-1]).reshape(1, 64))
        grey.append(np.asarray(flat.resize((16, 16), Image.Resampling.BOX)).reshape(1, 256))
    return _Prints(places, digests, np.concatenate(bits), np.concatenate(grey), broken)


def _pictures(images: ImageSet) -> Iterator[tuple[str, Image.Image | str, str]]:
    """Place, picture (or the reason why it cannot be read), and hash as stored, of every image."""
    if isinstance(images.pixels, EncodedPixels):
        contents = images.pixels.contents
        for i in range(len(contents)):
            try:
                picture = to_rgb(contents.get(i))
                yield contents.place(i), picture, _digest(to_array(picture))
            except ValueError as error:
                yield contents.place(i), str(error), ""
    else:
        for i, (stored, used) in enumerate(images.pairs(range(len(images)))):
            yield f"{images.name}: image {i}", Image.fromarray(used.transpose(1, 2, 0).copy()), _digest(stored)


def _near_pairs(bits: np.ndarray, grey: np.ndarray, block: int = 1024) -> np.ndarray:
    """All pairs i < j that are near, int64 (pairs, 2). Hamming distance of ±1 vectors a, b of 64: (64 - a·b) / 2."""
    signs = torch.from_numpy(np.where(bits, 1.0, -1.0).astype(np.float32))
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(signs), block):
        close = signs[start : start + block] @ signs[start:].T >= 64 - 2 * BITS
        pairs = (close.triu(1)).nonzero().numpy() + start
        distance = np.concatenate(
            [np.zeros(0)]
            + [
                np.abs(grey[part[:, 0]].astype(np.int16) - grey[part[:, 1]].astype(np.int16)).mean(1)
                for part in np.array_split(pairs, max(1, len(pairs) // 100_000))
            ]
        )
        found.append(pairs[distance <= GREY])
    return np.concatenate(found)


def _sets(source: str, root: str | None) -> list[tuple[str, ImageSet]]:
    """Role and images of a source; folders are taken as they lie, without the split that training would make."""
    kind, _, rest = source.partition(":")
    if kind == "open":
        folder = Path(rest).expanduser()
        paths = tuple(image_files(folder)) if folder.is_dir() else ()
        if not paths:
            raise UserError(source, "is not a folder with images", "give a folder that holds image files at any depth")
        unlabelled = np.full(len(paths), -1, dtype=np.int64)
        return [("open", ImageSet(folder.name, EncodedPixels(FileContents(paths), 32), unlabelled, ()))]
    if kind == "folder" and Path(rest).expanduser().is_dir():
        folder = Path(rest).expanduser()
        parts = [(role, folder / n) for role, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES)) for n in names]
        parts = [(role, path) for role, path in parts if path.is_dir()]
        return [(role, all_images(path)) for role, path in parts] if len(parts) > 1 else [("train", all_images(folder))]
    train, test = load_source(DataConfig(source=source, root=root))
    return [("train", train), ("test", test)]
