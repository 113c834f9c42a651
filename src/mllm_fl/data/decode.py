"""From image bytes on a disk to uint8 tensors of one size, with one-line errors."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mllm_fl.errors import UserError

PIXEL_LIMIT = 100_000_000  # width * height of one image; more is refused before it is decoded
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def to_rgb(content: bytes | Path) -> Image.Image:
    """Decode completely, turn upright (EXIF), convert to RGB. Raises ``ValueError`` with the reason in a few words."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ValueError(f"{image.width}x{image.height} pixels is more than {PIXEL_LIMIT:,}")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
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


def decode_all(
    contents: Sequence[bytes | Path], size: int, place: Callable[[int], str], *, zoom: float = 1.0, threads: int = 4
) -> Tensor:
    """Decode and fit many images: uint8 (n, 3, size, size). ``place(i)`` names image i if it turns out to be broken."""
    out = np.empty((len(contents), 3, size, size), dtype=np.uint8)

    def one(i: int) -> None:
        try:
            out[i] = to_array(fit(to_rgb(contents[i]), size, zoom))
        except ValueError as error:
            raise UserError(
                place(i), str(error), "repair or remove it; `mllm-fl data check` lists every broken image"
            ) from None

    if len(contents) < 64:
        for i in range(len(contents)):
            one(i)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(one, range(len(contents)), chunksize=64):
                pass
    return torch.from_numpy(out)


@dataclass(frozen=True)
class FilePixels:
    """Image files that are decoded each time they are read; ``size`` pixels a side, shorter side first ``size * zoom``."""

    paths: tuple[Path, ...]
    size: int
    zoom: float = 1.0

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        paths = [self.paths[int(i)] for i in indices]
        return decode_all(paths, self.size, lambda i: str(paths[i]), zoom=self.zoom)
