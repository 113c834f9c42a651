"""A corpus in the forms that others read: LLaVA's JSON, JSONL, webdataset archives, a Hugging Face data set folder, or a corpus folder of the kept records.

What leaves is what passed: records that fail a check or were dropped in review stay behind, unless all are asked for, and the count says so. The target appears
whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_fl.annotate import review, truth
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.quality import sheet
from mllm_fl.annotate.quality.check import read as read_raw
from mllm_fl.annotate.records import Record, save
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent

SHARD = 256 << 20  # bytes of pictures in one archive or Parquet file


@dataclass(frozen=True)
class Exported:
    """How many records left, how many there are, and why the others stayed (check or "dropped in review" -> records)."""

    out: Path
    records: int
    of: int
    stayed: dict[str, int]


def selected(corpus: Corpus, everything: bool = False) -> tuple[list[Record], dict[str, int]]:
    """The records that passed, relabelled ones with their new words, and why the others stayed behind, counted by the first reason.

    Raises:
        UserError: the checks are about another state of the corpus.
    """
    decisions = review.read(corpus.folder)
    raw = read_raw(corpus.folder)
    sheets = sheet.read(corpus.folder, raw.images, raw.ids)
    out: list[Record] = []
    stayed: dict[str, int] = {}
    for record in corpus.records:
        decision = decisions.get(record.id)
        why = None
        if decision is not None and decision.decision == "drop":
            why = "dropped in review"
        elif decision is None and sheets is not None:
            why = next(iter(sheets[1].reasons(record.id)), None)
        if why is not None and not everything:
            stayed[why] = stayed.get(why, 0) + 1
            continue
        out.append(review.applied(record, decision))
    return out, stayed


def export(corpus: Corpus, out: Path, form: str, *, everything: bool = False, progress: Progress = silent) -> Exported:
    """Write the records that passed to the folder ``out``, which must not exist. ``form``: one of :data:`FORMS`.

    Raises:
        UserError: unknown form, target there already or not writable, nothing to write, a picture that cannot be read.
    """
    if form not in FORMS:
        raise UserError(f"--form {form}", "is no form of export", f"use one of {', '.join(FORMS)}")
    if out.exists():
        raise UserError(out, "is there already", "name another folder, or delete it")
    records, stayed = selected(corpus, everything)
    if not records:
        raise UserError(corpus.folder, "no record passed", "look at `mllm-fl corpus card`, or export with --all")
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        new.mkdir(parents=True)
        FORMS[form](corpus, records, new, progress)
        new.rename(out)
    except OSError as e:
        raise UserError(
            out, f"cannot be written ({e.strerror or e})", "choose a writable folder with free space"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Exported(out, len(records), len(corpus.records), stayed)


def _pictures(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """Copies of the pictures under their own names."""
    images = list(dict.fromkeys(r.image for r in records))
    for n, image in enumerate(images):
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(corpus.folder / image, out / image)
        if n % 256 == 0:
            progress(Event("export", n, len(images), "pictures"))


def _llava(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """``chat.json``, one JSON list in LLaVA's form, and the pictures beside it."""
    _pictures(corpus, records, out, progress)
    save(records, out / "chat.json")


def _jsonl(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """``records.jsonl``, a record a line, and the pictures."""
    _pictures(corpus, records, out, progress)
    with (out / "records.jsonl").open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in records)


def _corpus(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """A corpus folder of its own: what pretraining takes."""
    _pictures(corpus, records, out, progress)
    kept = {r.image for r in records}
    for name in ("truth.jsonl", "scenes.jsonl", "pictures.jsonl"):
        if (corpus.folder / name).exists():
            lines = [r for r in truth.rows(corpus.folder / name) if r.get("image") in kept]
            (out / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines), encoding="utf-8")
    card = {k: v for k, v in corpus.card.items() if k not in ("quality", "review")}
    card |= {
        "selected": {"from": corpus.folder.name, "records": len(records), "of": len(corpus.records)},
        "records": len(records),
        "images": len(kept),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save(records, out / "records.json")


def _shards(corpus: Corpus, records: Sequence[Record]) -> list[list[Record]]:
    """The records in parts of at most ``SHARD`` bytes of pictures."""
    parts: list[list[Record]] = [[]]
    size = 0
    for record in records:
        length = (corpus.folder / record.image).stat().st_size
        if size and size + length > SHARD:
            parts.append([])
            size = 0
        parts[-1].append(record)
        size += length
    return parts


def _webdataset(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """``corpus-000000.tar``, ...: a sample per record, ``NNNNNNNN.png`` (or .jpg) and ``NNNNNNNN.json``."""
    n = 0
    for shard, part in enumerate(_shards(corpus, records)):
        with tarfile.open(out / f"corpus-{shard:06d}.tar", "w") as tar:
            for record in part:
                _member(
                    tar,
                    f"{n:08d}{Path(record.image).suffix.lower() or '.png'}",
                    (corpus.folder / record.image).read_bytes(),
                )
                _member(tar, f"{n:08d}.json", json.dumps(record.to_json(), ensure_ascii=False).encode())
                n += 1
                progress(Event("export", n, len(records), "samples"))


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_SCHEMA = pa.schema(
    [("id", pa.string()), ("kind", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("conversations", pa.list_(_TURN))],
    metadata={"huggingface": json.dumps({"info": {"features": {
        "id": {"dtype": "string", "_type": "Value"}, "kind": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"},
        "conversations": [{"from": {"dtype": "string", "_type": "Value"}, "value": {"dtype": "string", "_type": "Value"}}],
    }}})},
)  # fmt: skip


def _hugging_face(corpus: Corpus, records: Sequence[Record], out: Path, progress: Progress) -> None:
    """``data/train-00000-of-0000N.parquet`` and a README: what ``datasets.load_dataset(folder)`` reads."""
    (out / "data").mkdir()
    parts = _shards(corpus, records)
    for n, part in enumerate(parts):
        progress(Event("export", n, len(parts), "Parquet files"))
        with pq.ParquetWriter(out / "data" / f"train-{n:05d}-of-{len(parts):05d}.parquet", _SCHEMA) as writer:
            for start in range(0, len(part), 512):
                rows = [_row(corpus, r) for r in part[start : start + 512]]
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    (out / "README.md").write_text("---\ntask_categories:\n- image-to-text\n---\n\n" f"{len(records)} records in LLaVA's form, exported by mllm-fl.\n", encoding="utf-8")  # fmt: skip


def _row(corpus: Corpus, record: Record) -> dict[str, Any]:
    raw = record.to_json()
    content = (corpus.folder / record.image).read_bytes()
    return {
        "id": record.id,
        "kind": record.kind,
        "image": {"bytes": content, "path": Path(record.image).name},
        "conversations": raw["conversations"],
    }


FORMS: dict[str, Callable[[Corpus, Sequence[Record], Path, Progress], None]] = {
    "llava": _llava, "jsonl": _jsonl, "webdataset": _webdataset, "huggingface": _hugging_face, "corpus": _corpus,
}  # fmt: skip
