"""Image sets in Hugging Face's Parquet form: ``{split}-00000-of-00001.parquet``, images as struct<bytes, path>."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_fl.data.decode import EncodedPixels
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

IMAGE_COLUMNS = ("img", "image", "images", "picture")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target")


class ColumnContents:
    """Encoded images in an Arrow column; the column is read from its Parquet files when the first image is asked for."""

    def __init__(self, files: tuple[Path, ...], column: str, rows: int, table: Any = None) -> None:
        self.files, self.column, self.rows = files, column, rows
        self._ends = [int(n) for n in np.cumsum([pq.ParquetFile(file).metadata.num_rows for file in files])]
        self._bytes = None if table is None else _bytes_of(table, column, "data.source")

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads the files itself."""
        return self.__dict__ | ({"_bytes": None} if self.files else {})

    def __len__(self) -> int:
        return self.rows

    def get(self, index: int) -> bytes:
        if self._bytes is None:
            self._bytes = _bytes_of(_read(self.files, [self.column]), self.column, self.files[0])
            pa.default_memory_pool().release_unused()  # what reading took beside: 100 MB for CIFAR's training images
        content = self._bytes[index].as_py()
        if not content:
            raise ValueError("the row holds no image bytes")
        return bytes(content)

    def place(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return f"{self.files[part]}: row {index - [0, *self._ends][part]}" if self.files else f"row {index}"


def _bytes_of(table: Any, column: str, place: object) -> Any:
    """The chunked array of encoded images in a column that is struct<bytes, path> or plain binary."""
    values = table[column]
    kind = values.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        index = kind.get_field_index("bytes")
        return pa.chunked_array([chunk.flatten()[index] for chunk in values.chunks], type=kind.field(index).type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return values
    raise UserError(
        place, f"column {column!r} holds {kind}, not images", "store struct<bytes, path> as Hugging Face does"
    )


def _read(files: Sequence[Path], columns: list[str]) -> Any:
    try:
        return pa.concat_tables([pq.read_table(file, columns=columns, partitioning=None) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files, error) from None


def _unreadable(files: Sequence[Path], error: Exception) -> UserError:
    for file in files:
        try:
            pq.ParquetFile(file).read()
        except (pa.ArrowException, OSError) as cause:
            return UserError(
                file, f"is not a whole Parquet file ({str(cause).partition('.')[0]})", "download or copy it again"
            )
    return UserError(files[0], str(error), "download or copy the files again")


def split_files(folder: Path, split: str) -> tuple[Path, ...]:
    """The Parquet files of one split in a folder, its ``data`` or its only sub-folder, in order; empty if there are none."""
    for place in (folder, folder / "data", folder / "plain_text", folder / folder.name):
        found = sorted([*place.glob(f"{split}-*.parquet"), *place.glob(f"{split}.parquet")])
        if found:
            return tuple(found)
    return ()


def load_split(
    files: Sequence[Path],
    name: str,
    size: int,
    *,
    images: Sequence[str] = IMAGE_COLUMNS,
    labels: Sequence[str] = LABEL_COLUMNS,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> ImageSet:
    """One split as an image set; ``images`` and ``labels`` are the column names to look for, best first."""
    try:
        schema = pq.read_schema(files[0])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files, error) from None
    image, label = pick(schema.names, images, files[0], "image"), pick(schema.names, labels, files[0], "label")
    values = _read(files, [label])[label]
    numbers, names = decode_labels(values, class_names(schema.metadata, label), files[0], label)
    stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return ImageSet(name, _pixels(tuple(files), stamp, image, len(numbers), size), numbers, names, mean, std)


@lru_cache(maxsize=4)
def _pixels(files: tuple[Path, ...], stamp: object, column: str, rows: int, size: int) -> EncodedPixels:
    """Decoded pixels are shared by all federations built in this process from the same unchanged files."""
    return EncodedPixels(ColumnContents(files, column, rows), size)


def pick(columns: Sequence[str], wanted: Sequence[str], place: object, what: str) -> str:
    """The first wanted column that exists, or an error that lists what does."""
    for name in wanted:
        if name in columns:
            return name
    raise UserError(
        place,
        f"no {what} column among {', '.join(columns)}",
        f"rename it to {wanted[0]!r} (also read: {', '.join(wanted[1:]) or '-'})",
    )


def class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Names of a ClassLabel column from Hugging Face's schema metadata, None if it says nothing."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def decode_labels(
    values: Any, names: tuple[str, ...] | None, place: object, column: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (N,) and class names from an Arrow column of integers, or of words (then sorted)."""
    if values.null_count:
        raise UserError(place, f"column {column!r} has {values.null_count} rows without a label", "drop those rows")
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        words = values.to_pylist()
        names = tuple(sorted(set(words)))
        number = {word: i for i, word in enumerate(names)}
        return np.array([number[word] for word in words], dtype=np.int64), names
    if not pa.types.is_integer(values.type):
        raise UserError(
            place, f"column {column!r} holds {values.type}, not class numbers", "store integers or class names"
        )
    numbers = values.to_numpy().astype(np.int64)
    if not len(numbers):
        raise UserError(place, "has no rows", "give a file with images")
    if names is None:
        names = tuple(map(str, range(int(numbers.max()) + 1)))
    if numbers.min() < 0 or numbers.max() >= len(names):
        wrong = int(numbers.min() if numbers.min() < 0 else numbers.max())
        raise UserError(
            place, f"label {wrong} in column {column!r} is outside 0..{len(names) - 1}", "repair the labels"
        )
    return numbers, names
