"""The embedded default: 1,797 real handwritten digits (see embedded/digits.LICENSE.md), no download, no scikit-learn."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from PIL import Image

from mllm_fl.data.images import ImageSet, MemoryPixels

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def raw_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (1797, 8, 8) with values 0..16 and labels int64 (1797,), in scikit-learn's order."""
    with (
        (files("mllm_fl.data") / "embedded" / "digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as content,
    ):
        return content["images"], content["labels"].astype(np.int64)


def load_digits(size: int = 16) -> tuple[ImageSet, ImageSet]:
    """Training and test digits, ``size`` pixels a side (bilinear), three equal channels.

    Training: the first half of each class in scikit-learn's order (rounded down); test: the rest. The order of the file
    follows the writers, so no division by writer is claimed.
    """
    small, labels = raw_digits()
    grey = np.rint(small * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR)) for x in grey])
    native = np.broadcast_to(grey[:, None], (len(grey), 3, 8, 8))
    whole = ImageSet("digits", MemoryPixels(torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1), native), labels, NAMES)
    train: list[int] = []
    for c in range(10):
        of_class = np.flatnonzero(labels == c)
        train += of_class[: len(of_class) // 2].tolist()
    test = np.setdiff1d(np.arange(len(labels)), train)
    return whole.subset(sorted(train)), whole.subset(test.tolist(), "digits test")
