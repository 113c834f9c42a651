"""Small images and data sets written to disk, for the tests of the sources."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def noise(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A random picture, uint8 (height, width, 3), smooth enough to be told from others by its thumbnail."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: np.ndarray, form: str = "PNG", quality: int = 90) -> bytes:
    """The picture as file bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form, quality=quality)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object],
    names: Sequence[str] | None = None,
    columns: tuple[str, str] = ("img", "label"),
) -> None:
    """A Parquet file in Hugging Face's form; ``names`` become ClassLabel metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features: dict[str, object] = {columns[0]: {"_type": "Image"}}
    if names is not None:
        features[columns[1]] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table({columns[0]: [{"bytes": b, "path": None} for b in images], columns[1]: list(labels)})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        path,
        row_group_size=7,
    )


def write_folder(root: Path, classes: dict[str, int], seed: int = 0) -> None:
    """A class-per-sub-folder tree of PNG files."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            (root / name / f"{i:03}.png").write_bytes(encoded(noise(seed)))
