"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from Parquet files, from the hub, or from the official *binary* archives."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mllm_fl.data.decode import fit_all
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.data.parquet import load_split, split_files
from mllm_fl.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CReFF's constants, which it uses for CIFAR-100 too


@dataclass(frozen=True)
class _Layout:
    """How one of the two data sets is stored."""

    hub: str
    classes: int
    label_columns: tuple[str, ...]
    folder: str
    archive: str
    pickles: tuple[str, ...]
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int


LAYOUTS = {
    "cifar10": _Layout(
        hub="uoft-cs/cifar10",
        classes=10,
        label_columns=("label",),
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        pickles=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        train=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": _Layout(
        hub="uoft-cs/cifar100",
        classes=100,
        label_columns=("fine_label", "label"),
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        pickles=("cifar-100-python", "cifar-100-python.tar.gz"),
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        label_bytes=2,
    ),
}


def data_root(root: str | None, source: str) -> Path:
    """The folder or file of a source: ``data.root``, else the environment variable MLLM_FL_DATA; it must exist."""
    named = root or os.environ.get("MLLM_FL_DATA")
    if not named:
        raise UserError(
            "data.root", f"{source} needs a folder and none is given", "set data.root or the variable MLLM_FL_DATA"
        )
    path = Path(named).expanduser()
    if not path.exists():
        place = "data.root" if root else "MLLM_FL_DATA"
        raise UserError(
            place, f"{path} does not exist", f"give the folder that holds {source}, or data.root = 'hf:NAME'"
        )
    return path


def load_cifar(source: str, root: str | None, size: int = 32) -> tuple[ImageSet, ImageSet]:
    """Training and test images in the official order; Parquet pixels are decoded when first read.

    ``root``: a folder of Parquet files, the official binary archive or its extracted folder, the parent of one of these,
    or ``hf:NAME`` for the hub. The official *pickle* archives are refused: reading a pickle runs whatever code is in it.
    """
    layout = LAYOUTS[source]
    if root is not None and root.startswith("hf:"):
        from mllm_fl.data.hub import load_hub

        loaded = load_hub(root.removeprefix("hf:"), size, labels=layout.label_columns)
        train, test = (
            replace(part, name=name, mean=MEAN, std=STD)
            for part, name in zip(loaded, (source, f"{source} test"), strict=True)
        )
    else:
        train, test = _from_disk(source, layout, data_root(root, source), size)
    if len(train.class_names) != layout.classes:
        raise UserError(
            root or "MLLM_FL_DATA",
            f"has {len(train.class_names)} classes, not the {layout.classes} of {source}",
            "check the path",
        )
    return train, test


def _from_disk(source: str, layout: _Layout, root: Path, size: int) -> tuple[ImageSet, ImageSet]:
    for folder in (root / source, root):
        train, test = split_files(folder, "train"), split_files(folder, "test")
        if train and test:
            one, two = (
                load_split(files, name, size, images=("img", "image"), labels=layout.label_columns, mean=MEAN, std=STD)
                for files, name in ((train, source), (test, f"{source} test"))
            )
            return one, two
        if train or test:
            raise UserError(
                folder, f"has only the {'train' if train else 'test'} Parquet file", "copy the other one beside it"
            )
    for place in (root, root / layout.folder, root / source, root / source / layout.folder):
        if (place / layout.test).is_file():
            return _from_binary(source, layout, {p.name: p for p in place.iterdir() if p.is_file()}, place, size)
    for place in (root, root / layout.archive, root / source / layout.archive):
        if place.is_file() and place.name not in layout.pickles:
            return _from_archive(source, layout, place, size)
    for place in (root, root / source):
        for name in layout.pickles:
            if place.name == name or (place / name).exists():
                found = place if place.name == name else place / name
                raise UserError(
                    found,
                    "is a pickle, which can run any code when read",
                    f"use {layout.archive} or Parquet files (hf:{layout.hub})",
                )
    raise UserError(
        root, f"holds no {source}", f"it needs {source}/train-*.parquet and test-*.parquet, or {layout.archive}"
    )


def _from_archive(source: str, layout: _Layout, archive: Path, size: int) -> tuple[ImageSet, ImageSet]:
    """Read the members in memory; nothing is extracted."""
    wanted = {*layout.train, layout.test, layout.names}
    content: dict[str, Path | bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if Path(member.name).name in wanted and member.isfile():
                    file = tar.extractfile(member)
                    content[Path(member.name).name] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(archive, f"is not a whole tar archive ({error})", f"download {layout.archive} again") from None
    return _from_binary(source, layout, content, archive, size)


def _from_binary(
    source: str, layout: _Layout, files: dict[str, Path] | dict[str, Path | bytes], place: Path, size: int
) -> tuple[ImageSet, ImageSet]:
    """Official binary records: label bytes (the last one is the fine label), then 3072 bytes in (channel, row, column) order."""

    def content(name: str) -> bytes:
        if name not in files:
            raise UserError(place, f"lacks {name}", f"use the whole {layout.archive}")
        value = files[name]
        return value if isinstance(value, bytes) else value.read_bytes()

    names = tuple(content(layout.names).decode(errors="replace").split())

    def split(members: tuple[str, ...], name: str) -> ImageSet:
        parts = []
        for member in members:
            raw = np.frombuffer(content(member), dtype=np.uint8)
            record = layout.label_bytes + 3072
            if not len(raw) or len(raw) % record:
                raise UserError(
                    place, f"{member} is cut short ({len(raw)} bytes are not records of {record})", "download it again"
                )
            parts.append(raw.reshape(-1, record))
        rows = np.concatenate(parts)
        labels = rows[:, layout.label_bytes - 1].astype(np.int64)
        if labels.max() >= len(names):
            raise UserError(
                place, f"{members[0]} names class {labels.max()} of {len(names)}", f"use the whole {layout.archive}"
            )
        native = rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
        pixels = torch.from_numpy(fit_all(native, size).copy())
        store = MemoryPixels(pixels, None if size == 32 else native)
        return ImageSet(name, store, labels, names, MEAN, STD)

    return split(layout.train, source), split((layout.test,), f"{source} test")
