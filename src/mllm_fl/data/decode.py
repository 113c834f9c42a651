"""From image bytes on a disk to uint8 tensors of one size, with one-line errors."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mllm_fl.errors import UserError

CACHE_LIMIT = 2 << 30  # bytes of decoded pixels that one image set may keep
THREADS = min(8, os.cpu_count() or 1)
PIXEL_LIMIT = 100_000_000  # width * height of one image; more is refused before it is decoded
warnings.simplefilter(
    "ignore", Image.DecompressionBombWarning
)  # Pillow warns on stderr of what we refuse or accept knowingly
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def to_rgb(content: bytes | Path) -> Image.Image:
    """Decode completely, turn upright (EXIF), convert to RGB. Raises ``ValueError`` with the reason in a few words."""
    try:
        stream = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(stream, formats=_formats(content)) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ValueError(f"{image.width}x{image.height} pixels is more than {PIXEL_LIMIT:,}")
            image.load()
            upright = ImageOps.exif_transpose(image) if "exif" in image.info or image.format == "TIFF" else image
            return upright.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError("far too many pixels") from None
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (
        OSError,
        SyntaxError,
        EOFError,
        IndexError,
        TypeError,
        KeyError,
    ) as error:  # what Pillow's readers raise on bad bytes
        reason = "not an image" if "cannot identify" in str(error) else str(error).partition("\n")[0]
        raise ValueError(reason or "broken") from None


def _formats(content: bytes | Path) -> list[str] | None:
    """The one reader that the first bytes ask for; without it Pillow tries them all, six times slower on small images."""
    if isinstance(content, bytes):
        for magic, name in ((b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"RIFF", "WEBP")):
            if content.startswith(magic):
                return [name]
    return None


def fit(image: Image.Image, size: int, zoom: float = 1.0) -> Image.Image:
    """Resize the shorter side to ``round(size * zoom)`` (bilinear) and cut the centre ``size`` x ``size``."""
    short = round(size * zoom)
    if (image.width, image.height) == (size, size) and short == size:
        return image
    scale = short / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 of shape (3, height, width)."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


class Contents(Protocol):
    """Where N encoded images lie: bytes in memory or paths on a disk."""

    def __len__(self) -> int: ...

    def get(self, index: int) -> bytes | Path:
        """The encoded image at this position; ``ValueError`` says in a few words why there is none."""
        ...

    def place(self, index: int) -> str:
        """Name of this position for an error message, such as ``train.parquet: row 12``."""
        ...


@dataclass(frozen=True)
class FileContents:
    """One image file per position."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, index: int) -> Path:
        return self.paths[index]

    def place(self, index: int) -> str:
        return str(self.paths[index])


class EncodedPixels:
    """Encoded images that are decoded when first read, and then kept while all of them fit into ``CACHE_LIMIT`` bytes.

    ``size``: pixels a side after ``fit`` with ``zoom``. Whole sets of small images (CIFAR) are decoded once; large ones
    (ImageNet) at every read. Two threads that read the same image first write the same bytes, so there is no lock.
    """

    def __init__(self, contents: Contents, size: int, zoom: float = 1.0) -> None:
        self.contents, self.size, self.zoom = contents, size, zoom
        fits = len(contents) * 3 * size * size <= CACHE_LIMIT
        self._ready = np.zeros(len(contents), dtype=bool)
        self._whole = np.zeros(len(contents), dtype=bool)  # those that ``fit`` left as they were stored
        self._cache = np.empty((len(contents), 3, size, size), dtype=np.uint8) if fits else None

    def __reduce__(self) -> tuple[type[EncodedPixels], tuple[Contents, int, float]]:
        return EncodedPixels, (self.contents, self.size, self.zoom)  # another process decodes for itself

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at these positions: uint8, shape (n, 3, size, size)."""
        wanted = np.asarray(indices, dtype=np.int64)
        if self._cache is None:
            out = np.empty((len(wanted), 3, self.size, self.size), dtype=np.uint8)
            self._decode(wanted, out, np.arange(len(wanted)))
            return torch.from_numpy(out)
        self.prepare(wanted)
        return torch.from_numpy(self._cache[wanted])

    def prepare(self, indices: np.ndarray) -> None:
        """Decode what was not read before, where decoded pixels are kept."""
        if self._cache is not None:
            missing = np.unique(indices[~self._ready[indices]])
            if len(missing):
                self._decode(missing, self._cache, missing)
                self._ready[missing] = True

    def move(self, memory: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray | None:
        """Keep decoded pixels in the array that ``memory`` makes for a shape, from now on; None where none are kept.

        Images that nobody has read or prepared are zero in it.
        """
        if self._cache is not None:
            there = memory(self._cache.shape)
            there[self._ready] = self._cache[self._ready]
            self._cache = there
        return self._cache

    def pairs(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each image as it is stored, at its own size, and as :meth:`read` gives it; both uint8 (3, height, width)."""
        for start in range(0, len(indices), 64):
            part = list(indices[start : start + 64])
            if self._cache is not None:
                self.read(part)
                kept = self._cache
                yield from ((kept[i] if self._whole[i] else to_array(self._picture(i)), kept[i]) for i in part)
            elif len(part) < 8:
                yield from map(self._pair, part)
            else:
                with ThreadPoolExecutor(THREADS) as pool:
                    yield from list(pool.map(self._pair, part))

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        stored = self._picture(index)
        used = fit(stored, self.size, self.zoom)
        array = to_array(used)
        return (array if used is stored else to_array(stored)), array

    def _picture(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.contents.get(index))
        except ValueError as error:
            way_out = "repair or remove it; `mllm-fl data check` lists every broken image"
            raise UserError(self.contents.place(index), str(error), way_out) from None

    def _decode(self, indices: np.ndarray, out: np.ndarray, rows: np.ndarray) -> None:
        """Decode the images at ``indices`` into these rows of ``out``."""

        def run(part: slice) -> None:
            for i, row in zip(indices[part].tolist(), rows[part].tolist(), strict=True):
                stored = self._picture(i)
                used = fit(stored, self.size, self.zoom)
                out[row] = to_array(used)
                self._whole[i] = used is stored

        # Measured on CIFAR's WebP bytes: 73 us an image on one thread, 73 on two, 111 on four (the interpreter lock);
        # threads pay only where one image takes a millisecond, so images in memory that fit into the cache use one.
        if len(indices) < 8 or (self._cache is not None and not isinstance(self.contents, FileContents)):
            run(slice(None))
            return
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(run, (slice(start, start + 8) for start in range(0, len(indices), 8))))


def fit_all(images: np.ndarray, size: int) -> np.ndarray:
    """Raw images uint8 (n, 3, height, width) brought to ``size`` pixels a side."""
    if images.shape[2:] == (size, size):
        return images
    return np.stack([to_array(fit(Image.fromarray(x.transpose(1, 2, 0)), size)) for x in images])
