"""A site's own images: a folder with one sub-folder a class, or a list of files; read where they lie, never sent.

Labels are agreed by name: a site may lack classes that the server knows, and has none that it does not.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mllm_fl.data.decode import EncodedPixels, FileContents
from mllm_fl.data.folder import TRAIN_NAMES, class_folders, image_files
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.reception import difference
from mllm_fl.errors import UserError

FORMS = "folder:PATH (one sub-folder a class) or list:PATH.csv (two columns: file,label)"


class Mismatch(UserError):
    """The site has classes that the server does not know; ``told`` is what the server may hear of it."""

    def __init__(self, place: object, told: str) -> None:
        super().__init__(
            place, f"its class names are not the server's ({told})", "rename the classes, or have the server add them"
        )
        self.told = told


def named(source: str) -> dict[str, list[Path]]:
    """Every image file of a site by class name, in order of name.

    Raises:
        UserError: unknown form, no such place, or no image in it.
    """
    kind, _, rest = source.partition(":")
    path = Path(rest).expanduser()
    if kind == "folder":
        if not path.is_dir():
            raise UserError(f"data={source}", "is not a folder", "mount it, or correct data in node.toml")
        root = next((path / n for n in TRAIN_NAMES if (path / n).is_dir()), path)
        found = {name: image_files(root / name) for name in class_folders(root)}
    elif kind == "list":
        found = _listed(path, source)
    else:
        raise UserError(f"data={source}", "is no place of images", f"write {FORMS}")
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise UserError(f"data={source}", "holds no image", f"put images there: {FORMS}")
    return found


def site_images(
    source: str, class_names: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float]
) -> ImageSet:
    """The site's training images with the server's labels and normalisation.

    Raises:
        Mismatch: a class that the server does not know. UserError: as :func:`named`.
    """
    found = named(source)
    if set(found) - set(class_names):
        raise Mismatch(f"data={source}", difference(list(found), class_names))
    order = [(class_names.index(name), file) for name in sorted(found) for file in found[name]]
    order.sort(key=lambda p: p[0])
    labels = np.array([c for c, _ in order], dtype=np.int64)
    pixels = EncodedPixels(FileContents(tuple(file for _, file in order)), size)
    images = ImageSet("site", pixels, labels, tuple(class_names))
    m, s = (tuple(float(v) for v in x) for x in (mean, std))
    return replace(images, mean=(m[0], m[1], m[2]), std=(s[0], s[1], s[2]))


def _listed(path: Path, source: str) -> dict[str, list[Path]]:
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = [r for r in csv.reader(f) if r]
    except OSError as e:
        raise UserError(f"data={source}", f"cannot be read: {e.strerror}", "correct data in node.toml") from e
    if rows and [c.strip().lower() for c in rows[0]] == ["file", "label"]:
        rows = rows[1:]
    found: dict[str, list[Path]] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(f"{path}: row {number}", f"has {len(row)} columns", "write file,label")
        file = Path(os.path.join(path.parent, row[0].strip()))
        if not file.is_file():
            raise UserError(f"{path}: row {number}", f"{row[0].strip()} is not there", "correct the list")
        found.setdefault(row[1].strip(), []).append(file)
    return {name: sorted(files) for name, files in found.items()}
