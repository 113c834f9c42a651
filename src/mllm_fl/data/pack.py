"""One federation as one folder of Parquet files that can be carried to another machine.

``train``, ``test`` and ``leftover`` hold lossless images with label and (training) index; ``positions`` holds the label of
every training position, packed or not, so that indices, manifest and hashes stay what they were; ``pack.json`` the rest.
The folder is also a plain Hugging Face image data set: ``hf:FOLDER`` reads its train and test parts.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, features
from torch import Tensor

from mllm_fl.data import manifest as manifests
from mllm_fl.data.decode import to_array, to_rgb
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet, Pair, Pixels
from mllm_fl.data.parquet import load_split, split_files
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream

FORMAT = 1


def pack(federation: Federation, folder: str | Path, *, leftover_per_class: int = 100) -> Path:
    """Write the clients' images, the test images and up to ``leftover_per_class`` unheld training images of each class.

    The folder appears whole or not at all, and an existing one is never touched. Returns the folder.
    """
    target = Path(folder)
    if federation.manifest.partition == "virtual":
        raise UserError("data.partition", "virtual clients cannot be packed", "pack another partition of these images")
    if target.exists():
        raise UserError(target, "exists already", "choose a new folder or remove it")
    spare = _choose_spare(federation, leftover_per_class)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(target, f"cannot be written ({error.strerror})", "choose a writable folder") from None
    try:
        train = federation.train
        held = sorted(i for indices in federation.manifest.clients for i in indices)
        _write(temporary, "train", train, held)
        _write(temporary, "leftover", train, spare)
        _write(temporary, "test", federation.test, range(len(federation.test)))
        pq.write_table(
            pa.table({"label": train.labels.astype(np.int32)}), temporary / "positions.parquet", compression="zstd"
        )
        card = {
            "format": FORMAT,
            "name": train.name,
            "test_name": federation.test.name,
            "image_size": int(federation.test.read([0]).shape[-1]),
            "class_names": list(train.class_names),
            "mean": list(train.mean),
            "std": list(train.std),
            "manifest_sha256": federation.manifest.sha256,
        }
        (temporary / "pack.json").write_text(json.dumps(card, indent=1) + "\n")
        manifests.save(federation.manifest, temporary / "manifest.json")
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError as error:
        raise UserError(
            target, f"cannot be written ({error.strerror or error})", "choose a folder with free space"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _choose_spare(federation: Federation, per_class: int) -> list[int]:
    """Unheld training indices, up to ``per_class`` of each class, drawn with the manifest's seed."""
    held = {i for indices in federation.manifest.clients for i in indices}
    candidates = federation.spare if federation.spare is not None else range(len(federation.train))
    chosen: list[int] = []
    for c, indices in enumerate(manifests.by_class([i for i in candidates if i not in held], federation.train)):
        chosen += (
            numpy_stream(federation.manifest.seed, "pack leftover", c)
            .permutation(indices)[:per_class]
            .astype(int)
            .tolist()
        )
    return sorted(chosen)


def _write(folder: Path, split: str, images: ImageSet, indices: Sequence[int]) -> None:
    """One split: columns img (struct<bytes, path>), label, index."""
    labels = pa.array(images.labels[list(indices)].astype(np.int64))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    info = {
        "img": {"_type": "Image"},
        "label": {"names": list(images.class_names), "_type": "ClassLabel"},
        "index": {"dtype": "int64", "_type": "Value"},
    }
    schema = pa.schema(
        [("img", kind), ("label", pa.int64()), ("index", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": info}})},
    )
    rows: list[dict[str, Any]] = []
    for start in range(0, len(indices), 512):
        part = list(indices[start : start + 512])
        pixels = images.read(part)
        rows += [{"bytes": encode(x), "path": f"{i}.webp"} for i, x in zip(part, pixels, strict=True)]
    table = pa.table([pa.array(rows, kind), labels, pa.array(list(indices), pa.int64())], schema=schema)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=1000, compression="none")


def encode(x: Tensor) -> bytes:
    """Lossless bytes of one image uint8 (3, height, width): WebP, or PNG where Pillow lacks WebP. Checked by decoding."""
    image = Image.fromarray(np.ascontiguousarray(x.numpy().transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if features.check("webp"):
        image.save(buffer, "WEBP", lossless=True, quality=50, method=1, exact=True)
    else:
        image.save(buffer, "PNG")
    content = buffer.getvalue()
    if not (to_array(to_rgb(content)) == x.numpy()).all():
        raise UserError("data pack", "the image codec is not lossless here", "install another build of Pillow")
    return content


class SparsePixels:
    """Pixels of some of N positions: ``rows[i]`` is the row of position i in ``pixels``, or -1 if it was not packed."""

    def __init__(self, pixels: Pixels, rows: np.ndarray, place: Path) -> None:
        self.pixels, self.rows, self.place = pixels, rows, place

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at these positions: uint8, shape (n, 3, height, width); an unpacked position is an error."""
        return self.pixels.read(self._packed(indices))

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        """As packed, and as used. A pack holds the images as its maker used them: what they were before is not in it."""
        return self.pixels.pairs(self._packed(indices))

    def _packed(self, indices: Sequence[int]) -> list[int]:
        wanted = np.asarray(indices, dtype=np.int64)
        rows = self.rows[wanted]
        if (rows < 0).any():
            raise UserError(
                self.place, f"training image {wanted[rows < 0][0]} was not packed", "pack it with more leftovers"
            )
        return [int(row) for row in rows]


class _Joined:
    """Two stores, one after the other."""

    def __init__(self, first: Pixels, second: Pixels) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def read(self, indices: Sequence[int]) -> Tensor:
        wanted = np.asarray(indices, dtype=np.int64)
        late = wanted >= len(self.first)
        if not late.any():
            return self.first.read(wanted.tolist())
        if late.all():
            return self.second.read((wanted - len(self.first)).tolist())
        early = self.first.read(wanted[~late].tolist())
        out = torch.empty((len(wanted), *early.shape[1:]), dtype=torch.uint8)
        out[torch.from_numpy(~late)] = early
        out[torch.from_numpy(late)] = self.second.read((wanted[late] - len(self.first)).tolist())
        return out

    def pairs(self, indices: Sequence[int]) -> Iterator[Pair]:
        n = len(self.first)
        for i in indices:
            yield from self.first.pairs([i]) if i < n else self.second.pairs([i - n])


def load_pack(folder: str | Path, size: int | None = None) -> Federation:
    """The federation in a packed folder: the same clients, pixels, manifest and hashes as the one that was packed."""
    root = Path(folder).expanduser()
    try:
        card = json.loads((root / "pack.json").read_text())
        if card["format"] != FORMAT:
            raise UserError(
                root / "pack.json", f"has format {card['format']}, this version reads {FORMAT}", "pack it again"
            )
        names, side = tuple(card["class_names"]), size or int(card["image_size"])
        mean, std = (float(v) for v in card["mean"]), (float(v) for v in card["std"])
        common: dict[str, Any] = {"class_names": names, "mean": tuple(mean), "std": tuple(std)}
        labels = pq.read_table(root / "positions.parquet")["label"].to_numpy().astype(np.int64)
        parts = {split: split_files(root, split) for split in ("train", "leftover", "test")}
        index = {s: pq.read_table(parts[s][0], columns=["index"])["index"].to_numpy() for s in ("train", "leftover")}
        sets = {
            s: load_split(files, s, side, labels=("label",)) if s == "test" or len(index[s]) else None
            for s, files in parts.items()
        }
        rows = np.full(len(labels), -1, dtype=np.int64)
        rows[np.concatenate([index["train"], index["leftover"]])] = np.arange(
            len(index["train"]) + len(index["leftover"])
        )
        title, test_title, digest = str(card["name"]), str(card["test_name"]), card["manifest_sha256"]
    except (OSError, KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            root, f"is not a whole pack ({type(error).__name__}: {error})", "write it again with `mllm-fl data pack`"
        ) from None
    manifest = manifests.load(root / "manifest.json")
    if manifest.sha256 != digest:
        raise UserError(
            root / "manifest.json", "is not the manifest this pack was written with", "copy the whole pack again"
        )
    stores = [sets[s] for s in ("train", "leftover")]
    pixels = [s.pixels for s in stores if s is not None]
    whole = pixels[0] if len(pixels) == 1 else _Joined(*pixels)
    train = ImageSet(title, SparsePixels(whole, rows, root), labels, **common)
    manifests.verify(manifest, train, root / "manifest.json")
    test = sets["test"]
    assert test is not None
    return Federation(train, replace(test, name=test_title, **common), manifest, tuple(index["leftover"].tolist()))
