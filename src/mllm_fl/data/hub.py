"""Any labelled image set of the Hugging Face hub by name, or the same Parquet files in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_fl.data.decode import EncodedPixels
from mllm_fl.data.folder import stratified
from mllm_fl.data.images import ImageSet
from mllm_fl.data.parquet import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    ColumnContents,
    class_names,
    decode_labels,
    load_split,
    pick,
    split_files,
)
from mllm_fl.errors import UserError

TEST_SPLITS = ("test", "validation", "valid", "val")


def load_hub(name: str, size: int = 32, *, labels: Sequence[str] = LABEL_COLUMNS) -> tuple[ImageSet, ImageSet]:
    """Training and test images of ``name``: a local folder if it exists, else a name on the hub (needs ``datasets``).

    The test part is the split called test or validation; without one, every class is split one in five by row number.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = {split: files for split in ("train", *TEST_SPLITS) if (files := split_files(folder, split))}
        if "train" not in found:
            raise UserError(
                f"hf:{name}",
                "the folder has no train-*.parquet",
                "name the files as Hugging Face does, or use folder:PATH",
            )
        sets = {split: load_split(files, folder.name, size, labels=labels) for split, files in found.items()}
        title = folder.name
    else:
        if name.startswith((".", "/", "~")):
            raise UserError(f"hf:{name}", "no such folder", "give a folder of Parquet files or a name on the hub")
        sets, title = _from_hub(name, size, labels), name
    test = next((sets[split] for split in TEST_SPLITS if split in sets), None)
    train = sets["train"]
    if test is None:
        return stratified(train, [f"{title}/{row}" for row in range(len(train))])
    if test.class_names != train.class_names:
        raise UserError(
            f"hf:{name}", "training and test splits name different classes", "give both the same ClassLabel names"
        )
    return train, ImageSet(f"{title} test", test.pixels, test.labels, test.class_names, test.mean, test.std)


def load_tables(name: str) -> dict[str, Any]:
    """The splits of a hub data set as Arrow tables, pictures left encoded.

    Raises:
        UserError: ``datasets`` is not installed, or it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hf:{name}", "needs the package datasets", "pip install 'mllm-fl[data]', or give a local Parquet folder"
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"hf:{name}", f"cannot be loaded ({reason})", "check name and network, or give a local Parquet folder"
        ) from None
    return {split: dataset.data.table for split, dataset in loaded.items()}


def _from_hub(name: str, size: int, labels: Sequence[str]) -> dict[str, ImageSet]:
    tables = load_tables(name)
    if "train" not in tables:
        raise UserError(f"hf:{name}", f"has no split 'train' among {', '.join(tables)}", "use another data set")
    return {
        split: _image_set(name, tables[split], size, labels) for split in ("train", *TEST_SPLITS) if split in tables
    }


def _image_set(name: str, table: Any, size: int, labels: Sequence[str]) -> ImageSet:
    """One split of a hub data set, its images left encoded until they are read."""
    place = f"hf:{name}"
    image = pick(table.column_names, IMAGE_COLUMNS, place, "image")
    label = pick(table.column_names, labels, place, "label")
    numbers, names = decode_labels(table[label], class_names(table.schema.metadata, label), place, label)
    return ImageSet(name, EncodedPixels(ColumnContents((), image, len(numbers), table), size), numbers, names)
