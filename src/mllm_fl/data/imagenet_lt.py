"""ImageNet-LT (Liu et al. 2019, arXiv:1904.05160): official list files, ``path label`` a line, and an image root."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from mllm_fl.data.cifar import data_root
from mllm_fl.data.decode import EncodedPixels, FileContents
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ZOOM = 256 / 224  # the shorter side becomes 256 for a centre crop of 224


def load_imagenet_lt(root: str | None, size: int = 224) -> tuple[ImageSet, ImageSet]:
    """Training and test images, decoded at every read; the tail is in the lists, so keep ``imbalance_factor = 1``."""
    return load_list(root, "train", size), load_list(root, "test", size)


def load_list(root: str | None, split: str, size: int = 224) -> ImageSet:
    """One list, ``ImageNet_LT_{split}.txt`` or ``.txt.gz``, split ``train``, ``val`` (20 a class, balanced) or ``test``.

    The lists lie in the root or its ``imagenet_lt`` folder, the images at ROOT/path. Class names are those of
    ``classes.tsv`` (columns class, clip_name) beside the lists, else the WordNet numbers in the training paths.
    """
    base = data_root(root, "imagenet-lt")
    folders = [folder for folder in (base, base / "imagenet_lt", base / "ImageNet_LT") if folder.is_dir()]
    listed = _find(folders, f"ImageNet_LT_{split}.txt")
    if listed is None:
        raise UserError(
            base,
            f"holds no ImageNet_LT_{split}.txt or .txt.gz",
            "copy the official list files there, and set data.root",
        )
    paths, labels = read_list(listed)
    train_list = _find(folders, "ImageNet_LT_train.txt")
    training = read_list(train_list) if train_list and split != "train" else (paths, labels)
    names = _names(folders, *training)
    if labels.max() >= len(names):
        raise UserError(
            listed, f"label {labels.max()} is outside the {len(names)} classes", "use lists of the same release"
        )
    roots = [folder for folder in folders if (folder / paths[0]).is_file()]
    if not roots:
        raise UserError(
            base / paths[0],
            f"no such image, although {listed.name} lists it",
            "set data.root to the folder that holds the images",
        )
    files = tuple(roots[0] / path for path in paths)
    return ImageSet(
        "imagenet-lt" if split == "train" else f"imagenet-lt {split}",
        EncodedPixels(FileContents(files), size, ZOOM),
        labels,
        names,
        MEAN,
        STD,
    )


def read_list(path: Path) -> tuple[list[str], np.ndarray]:
    """Relative paths and int64 labels of an official list file, plain or gzipped."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = [line.rsplit(maxsplit=1) for line in file if line.strip()]
        labels = np.array([int(row[1]) for row in rows], dtype=np.int64)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(
            path, f"is not a list of 'path label' lines ({error})", "use the official ImageNet-LT list"
        ) from None
    if not rows or labels.min() < 0:
        raise UserError(path, "is empty or names a negative label", "use the official ImageNet-LT list")
    return [row[0] for row in rows], labels


def _find(folders: list[Path], name: str) -> Path | None:
    return next((p for folder in folders for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _names(folders: list[Path], paths: list[str], labels: np.ndarray) -> tuple[str, ...]:
    """Class names by label; a class without an image is called by its number."""
    table = _find(folders, "classes.tsv")
    if table is not None:
        with gzip.open(table, "rt") if table.suffix == ".gz" else table.open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        try:
            return tuple(row["clip_name"] for row in sorted(rows, key=lambda row: int(row["class"])))
        except (KeyError, ValueError) as error:
            raise UserError(
                table, f"has no column {error}", "give columns class and clip_name, or remove the file"
            ) from None
    wordnet = {int(label): Path(path).parent.name for path, label in zip(paths, labels, strict=True)}
    return tuple(wordnet.get(c, str(c)) for c in range(int(labels.max()) + 1))
