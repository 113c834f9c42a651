"""Corpora and pictures of others as a corpus folder: LLaVA's JSON files, image folders, Hugging Face data sets, webdataset archives, lists of addresses.

Pictures go through :mod:`mllm_fl.annotate.acquire`; records whose picture is not there are listed in ``left_out.jsonl`` with the reason and come back
when a later import gets the picture. ``records.json`` is written last. Without any record the folder is one of open images that
``annotate.source = "folder:..."`` takes; what is known about them (captions, labels, questions) lies in ``truth.jsonl``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_fl.annotate import acquire as acquiring
from mllm_fl.annotate import truth
from mllm_fl.annotate.acquire import Wanted, coverage
from mllm_fl.annotate.quality.check import update_card
from mllm_fl.annotate.records import IMAGE, Record, Turn, check_path, parse, save
from mllm_fl.annotate.sources import Item, open_source
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError
from mllm_fl.events import Progress, silent

LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class Imported:
    """What came in: counts of records and pictures per state, and why records were left out."""

    folder: Path
    records: int
    coverage: dict[str, int]
    left_out: dict[str, int]


def import_corpus(
    source: str, folder: Path, *, images: Path | None = None, captions: bool = False, licence: str | None = None, limit: int | None = None, progress: Progress = silent
) -> Imported:  # fmt: skip
    """Bring ``source`` into ``folder``; the same call again tries only pictures that are not ok.

    ``source``: a LLaVA file (.json, .jsonl), a folder of pictures, of Parquet or Arrow files (Hugging Face) or of .tar files (webdataset), ``hf:NAME``, ``urls:FILE``.
    ``images``: where a LLaVA file's pictures are, a folder or a zip (default: beside the file). ``captions``: captions become records of kind caption
    instead of truth. ``licence``: of pictures whose source says none. ``limit``: only so many items.

    Raises:
        UserError: nothing readable there, a path that leaves the image folder, a folder that holds another corpus, or it cannot be written.
    """
    begun = folder / "imported.json"
    what = {"source": source, "images": str(images) if images else None, "captions": captions, "limit": limit}
    if (folder / "annotate.json").exists() or ((folder / "records.json").exists() and not begun.exists()):
        raise UserError(folder, "holds a corpus that was not imported", "use another folder")
    if begun.exists() and (then := _read_json(begun)) != what:
        raise UserError(
            folder,
            f"holds an import of {then.get('source') if isinstance(then, dict) else '?'} with other options",
            "use another folder",
        )
    with open_source(source, images, limit) as (items, total):
        safe = [_safe(i, item, source) for i, item in enumerate(items)]  # refused before anything is written
        write_whole(begun, (json.dumps(what, indent=1) + "\n").encode())
        got = acquiring.acquire((_wanted(i, licence) for i in _distinct(safe)), folder, progress, total=total)
    return _finish(folder, source, safe, got, captions)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read ({e})", "use another folder") from None


def _safe(i: int, item: Item, source: str) -> Item:
    """The item with its picture under ``images/``."""
    if item.name is None:
        return item
    check_path(item.name, f"{source}: record {i + 1}")
    name, key = (_whole(t, lambda c: f"_{ord(c):x}") for t in (item.name, item.key))
    return replace(item, name=f"images/{name}", key=key, truth=_cleaned(item.truth))


def _whole(text: str, instead: Callable[[str], str] = lambda _: "\ufffd") -> str:
    """The text without lone surrogates: what a file's name that is no UTF-8 and half an escaped character become in Python."""
    return "".join(instead(c) if "\ud800" <= c <= "\udfff" else c for c in text)


def _cleaned(value: Any) -> Any:
    """A JSON value whose texts can be written as UTF-8."""
    if isinstance(value, dict):
        return {k: _cleaned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    return _whole(value) if isinstance(value, str) else value


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        if item.name is not None and item.name not in seen:
            seen.add(item.name)
            yield item


def _wanted(item: Item, licence: str | None) -> Wanted:
    assert item.name is not None
    return Wanted(item.name, item.fetch, item.url, item.licence or licence, item.opt_out)


def _finish(
    folder: Path, source: str, items: Sequence[Item], got: dict[str, acquiring.Acquired], captions: bool
) -> Imported:
    records: list[Record] = []
    left: list[dict[str, Any]] = []
    truths: dict[str, dict[str, Any]] = {}
    ids: Counter[str] = Counter()
    for n, item in enumerate(items):
        found = got[item.name] if item.name is not None else None
        path = (found.same_as or found.path) if found is not None and found.state in ("ok", "duplicate") else None
        if path is not None and item.truth and not (captions and "captions" in item.truth):
            truths.setdefault(path, item.truth)
        for raw in _entries(item, captions):
            try:
                if path is None:
                    state = f"its picture is {found.state}: {found.why}" if found is not None else "it names no picture"
                    raise UserError("record", state)
                record = parse({**raw, "image": path, "id": raw.get("id") or f"{n:06d}"}, "record")
            except UserError as e:
                left.append({"why": str(e).removeprefix("record: "), "record": raw})
                continue
            ids[record.id] += 1
            records.append(record if ids[record.id] == 1 else replace(record, id=_free(record.id, ids)))
    if truths:
        lines = (json.dumps({"image": p, "path": p, "truth": t}, ensure_ascii=False) + "\n" for p, t in truths.items())
        write_whole(folder / truth.FILE, "".join(lines).encode())
    reasons = dict(Counter(_short(row["why"]) for row in left))
    write_whole(folder / LEFT_OUT, "".join(json.dumps(row) + "\n" for row in left).encode())
    cover = coverage(got.values())
    kinds = {k: {"ok": n} for k, n in Counter(r.kind or "record" for r in records).items()}
    update_card(
        folder,
        {
            "source": source,
            "images": cover["ok"],
            "records": len(records),
            "kinds": kinds,
            "coverage": cover,
            "left_out": reasons,
        },
    )
    if records:
        save(records, folder / "records.json")
    return Imported(folder, len(records), cover, reasons)


def _entries(item: Item, captions: bool) -> list[dict[str, Any]]:
    """The records of an item as raw entries; with ``captions`` each of its captions becomes one."""
    if not captions or not item.truth.get("captions"):
        return list(item.records)
    asked = Turn("human", f"{IMAGE}\nGive this picture a brief caption.")
    said = [Record(item.key, "x", (asked, Turn("gpt", c)), "caption").to_json() for c in item.truth["captions"]]
    return [*item.records, *said]


def _free(id: str, ids: Counter[str]) -> str:
    """Another id where one occurs twice, as in LLaVA's instruct files: ``17``, ``17-2``, ..."""
    while True:
        name = f"{id}-{ids[id]}"
        if not ids[name]:
            ids[name] += 1
            return name
        ids[id] += 1


def _short(why: str) -> str:
    return why.partition(":")[0] if why.startswith("its picture") else why
