"""A folder with one sub-folder per class, optionally inside ``train`` and ``test`` sub-folders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_fl.data.decode import EXTENSIONS, EncodedPixels, FileContents
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("test", "val", "valid", "validation")
TEST_PART = 5  # without a test folder, one image in five of every class is held out


def load_folder(path: str | Path, size: int = 32) -> tuple[ImageSet, ImageSet]:
    """Training and test images of a class-per-sub-folder tree, in order of class and file name.

    Without ``train`` and ``test`` sub-folders every class is split one in five by the SHA-256 of its file names: the same
    files always fall on the same side, whatever else is added.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder:{path}", "is not a folder", "give a folder with one sub-folder of images per class")
    train, test = _named(root, TRAIN_NAMES), _named(root, TEST_NAMES)
    if train and test:
        names = class_folders(train)
        extra = [name for name in class_folders(test) if name not in names]
        if extra:
            raise UserError(test, f"class {extra[0]!r} has no folder in {train}", "use the same class names in both")
        return _image_set(root.name, train, names, size), _image_set(f"{root.name} test", test, names, size)
    whole = all_images(root, size)
    contents = whole.pixels.contents if isinstance(whole.pixels, EncodedPixels) else None
    keys = [contents.place(i).removeprefix(str(root)) if contents else str(i) for i in range(len(whole))]
    return stratified(whole, keys)


def all_images(path: str | Path, size: int = 32) -> ImageSet:
    """Every image of a class-per-sub-folder tree as one set, in order of class and file name."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(path, "is not a folder", "give a folder with one sub-folder of images per class")
    return _image_set(root.name, root, class_folders(root), size)


def stratified(whole: ImageSet, keys: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    """Split one in five of every class off for testing, by the SHA-256 of each image's key; at least one on either side."""
    test: list[int] = []
    for c, name in enumerate(whole.class_names):
        of_class = np.flatnonzero(whole.labels == c).tolist()
        if len(of_class) < 2:
            raise UserError(
                f"{whole.name}: class {name!r}",
                f"has {len(of_class)} image{'' if len(of_class) == 1 else 's'}, too few to split into training and test",
                "add images, remove the class, or provide train and test parts",
            )
        ranked = sorted(of_class, key=lambda i: hashlib.sha256(keys[i].encode()).digest())
        test += ranked[: max(1, len(ranked) // TEST_PART)]
    train = np.setdiff1d(np.arange(len(whole)), test)
    return whole.subset(train.tolist()), whole.subset(sorted(test), f"{whole.name} test")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted; hidden ones are ignored."""
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise UserError(
            folder, "has no sub-folder", "put the images of each class into a sub-folder named like the class"
        )
    return names


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder by their extension, sorted by name; hidden files are ignored."""
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file() and not p.name.startswith(".")
    )


def _named(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _image_set(name: str, folder: Path, names: tuple[str, ...], size: int) -> ImageSet:
    files = [image_files(folder / class_name) if (folder / class_name).is_dir() else [] for class_name in names]
    paths = tuple(path for of_class in files for path in of_class)
    if not paths:
        raise UserError(folder, "holds no image in its class folders", f"use files that end in {', '.join(EXTENSIONS)}")
    labels = np.repeat(np.arange(len(names)), [len(of_class) for of_class in files])
    return ImageSet(name, EncodedPixels(FileContents(paths), size), labels, names)
