"""The records of a corpus, read from its file a piece at a time and checked; nothing of it is held."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_fl.annotate.records import Record, parse
from mllm_fl.errors import UserError
from mllm_fl.stages.pretraining.numbers import Numbers

CHUNK = 1 << 20  # characters of JSON that are read at a time


def records_file(corpus: Path) -> Path:
    """The records of a corpus: its records.json, or the file itself.

    Raises:
        UserError: neither is there, or the corpus is unfinished.
    """
    if corpus.is_file():
        return corpus
    if (corpus / "records.json").is_file():
        return corpus / "records.json"
    unfinished = (corpus / "ledger.sqlite").exists()
    problem = "the corpus is unfinished (no records.json)" if unfinished else "no corpus here (no records.json)"
    raise UserError(corpus, problem, "run `mllm-fl annotate CONFIG`, or name the folder or file of a corpus")


def entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, one after the other; the file is read in pieces.

    Raises:
        UserError: not a JSON list, or cut off.
    """
    decoder, text, at = json.JSONDecoder(), "", 0
    way_out = "restore it, or annotate again: answers are in the ledger"
    try:
        with path.open(encoding="utf-8") as f:
            head = f.read(1)
            while head.isspace():
                head = f.read(1)
            if head != "[":
                raise UserError(path, "holds no JSON list of records", "see LLaVA's chat.json for the form")
            while True:
                while at < len(text) and (text[at].isspace() or text[at] == ","):
                    at += 1
                if at < len(text) and text[at] == "]":
                    return
                try:
                    entry, at = decoder.raw_decode(text, at)
                except ValueError as e:
                    more = f.read(CHUNK)
                    if not more:
                        raise UserError(path, f"cannot be read as JSON ({e})", way_out) from None
                    text, at = text[at:] + more, 0
                    continue
                yield entry
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(path, f"cannot be read ({e})", way_out) from None


def records(corpus: Path) -> Iterator[Record]:
    """The checked records of a corpus, in order.

    Raises:
        UserError: an invalid record, two with one id, a picture that is missing or outside the folder, no record at all.
    """
    for record, _ in numbered(corpus):
        yield record


def numbered(corpus: Path) -> Iterator[tuple[Record, tuple[int, bool]]]:
    """:func:`records`, each with (its picture's number, whether the picture comes for the first time)."""
    path = records_file(corpus)
    root, i = path.parent.resolve(), -1
    with Numbers() as ids, Numbers() as pictures:
        for i, entry in enumerate(entries(path)):
            place = f"{path}: record {i + 1}"
            record = parse(entry, place)
            if not ids.of(record.id)[1]:
                raise UserError(place, f"id {record.id!r} occurs twice", "ids are unique")
            picture = pictures.of(record.image)
            if picture[1]:
                target = (root / record.image).resolve()
                if not target.is_relative_to(root):
                    raise UserError(place, f"image {record.image!r} leads out of the folder", "copy it into the folder")
                if not target.is_file():
                    raise UserError(place, f"image {record.image!r} is missing", "restore it, or remove the record")
            yield record, picture
    if i < 0:
        raise UserError(path, "holds no record", "annotate at least one picture")


def digests(corpus: Path) -> dict[str, str]:
    """SHA-256 of the records, and of the pictures' names and files: what a pretraining on this corpus depends on.

    The same numbers as :meth:`mllm_fl.annotate.corpus.Corpus.digests`, without holding the corpus.
    """
    said, pictures = hashlib.sha256(b"["), hashlib.sha256()
    root = records_file(corpus).parent
    for i, (record, (_, new)) in enumerate(numbered(corpus)):
        said.update(((", " if i else "") + json.dumps(record.to_json())).encode())
        if new:
            try:
                content = hashlib.sha256((root / record.image).read_bytes()).hexdigest()
            except OSError as e:
                problem = f"cannot be read ({e.strerror})"
                raise UserError(root / record.image, problem, "restore it, or remove its records") from None
            pictures.update(f"{record.image} {content}\n".encode())
    said.update(b"]")
    return {"records": said.hexdigest(), "pictures": pictures.hexdigest()}
