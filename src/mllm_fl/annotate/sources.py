"""What an import reads: each form of corpus or picture set as a stream of items, nothing decoded yet."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_fl.annotate.acquire import LARGEST, Refused, listed, of_file, of_url, of_zip
from mllm_fl.annotate.truth import rows
from mllm_fl.data.decode import EXTENSIONS
from mllm_fl.data.folder import image_files
from mllm_fl.data.parquet import IMAGE_COLUMNS, LABEL_COLUMNS, class_names
from mllm_fl.errors import UserError


@dataclass(frozen=True)
class Item:
    """One picture and what comes with it. ``name``: its relative path, None when it names none; ``records``: raw entries in LLaVA's form."""

    key: str
    name: str | None
    fetch: Callable[[], bytes]
    records: tuple[dict[str, Any], ...] = ()
    truth: dict[str, Any] = field(default_factory=dict)
    url: str | None = None
    licence: str | None = None
    opt_out: bool | None = None


@contextmanager
def open_source(source: str, images: Path | None, limit: int | None) -> Iterator[tuple[Iterable[Item], int]]:
    """The items of a source and how many there are (0: not known). See :func:`mllm_fl.annotate.imports.import_corpus`."""
    kind, _, rest = source.partition(":")
    if kind == "urls" and rest:
        found = [_of_url(n, row) for n, row in enumerate(listed(Path(rest)))]
        yield found[:limit], len(found[:limit])
        return
    if kind == "hf" and rest:
        from mllm_fl.data.hub import load_tables

        yield islice((i for split, t in load_tables(rest).items() for i in _of_table(t, split)), limit), 0
        return
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        with _archive(images or path.parent) as where:
            entries = _entries(path)[:limit]
            yield [_of_entry(n, e, where) for n, e in enumerate(entries)], len(entries)
        return
    if not path.is_dir():
        raise UserError(
            source, "is no file or folder that can be imported", "give a LLaVA .json, a folder, hf:NAME or urls:FILE"
        )
    tables = sorted([*path.rglob("*.parquet"), *path.rglob("*.arrow")])
    if tables:
        yield islice((i for f in tables for i in _of_table(_table(f), f.stem)), limit), 0
    elif tars := sorted(path.rglob("*.tar")):
        yield islice((i for f in tars for i in _of_tar(f)), limit), 0
    else:
        files = image_files(path)[:limit]
        if not files:
            raise UserError(
                source, "holds no picture, no .parquet, .arrow or .tar file", f"pictures end in {', '.join(EXTENSIONS)}"
            )
        yield [_of_picture(f, path) for f in files], len(files)


def _of_url(n: int, row: dict[str, str]) -> Item:
    suffix = PurePosixPath(row["url"].partition("?")[0]).suffix.lower()
    name = f"{n:07d}{suffix if suffix in EXTENSIONS else ''}"
    known = {"captions": [row["caption"]]} if row.get("caption") else {}
    return Item(f"{n:07d}", name, of_url(row["url"]), (), known, row["url"], row.get("licence") or row.get("license"))


def _of_picture(file: Path, root: Path) -> Item:
    """A picture of a folder; what lies beside it under the same name with .json or .txt (img2dataset's files form) is taken along."""
    name = file.relative_to(root).as_posix()
    beside: dict[str, bytes] = {}
    for suffix in (".json", ".txt"):
        if (sidecar := file.with_suffix(suffix)).is_file():
            beside[suffix[1:]] = sidecar.read_bytes()
    return _with_sidecars(name.rpartition(".")[0], name, of_file(file), beside, str(file))


def _with_sidecars(key: str, name: str, fetch: Callable[[], bytes], beside: dict[str, bytes], place: str) -> Item:
    known: dict[str, Any] = {}
    about: dict[str, Any] = {}
    if "json" in beside:
        try:
            about = json.loads(beside["json"])
        except ValueError as e:
            raise UserError(place, f"its .json cannot be read ({e})", "repair or remove it") from None
        about = about if isinstance(about, dict) else {}
    caption = beside["txt"].decode("utf-8", "replace").strip() if "txt" in beside else about.get("caption")
    if caption and "conversations" not in about:
        known["captions"] = [str(caption)]
    if "cls" in beside:
        known["labels"] = [beside["cls"].decode("utf-8", "replace").strip()]
    records = (about,) if "conversations" in about else ()
    status = about.get("status")
    if isinstance(status, str) and status not in ("success", "ok"):
        fetch = _refusing("dead", str(about.get("error_message") or status))
    opt_out = about.get("opt_out")
    return Item(
        key, name, fetch, records, known, about.get("url"), about.get("licence") or about.get("license"), opt_out if isinstance(opt_out, bool) else None,
    )  # fmt: skip


def _refusing(state: str, why: str) -> Callable[[], bytes]:
    def fetch() -> bytes:
        raise Refused(state, why)

    return fetch


def _giving(content: bytes) -> Callable[[], bytes]:
    return lambda: content


Finder = Callable[[str], Callable[[], bytes]]


@contextmanager
def _archive(images: Path) -> Iterator[Finder]:
    """How a LLaVA file's pictures are found, in a folder (or its ``images``) or in a zip, wherever in there."""
    if images.is_file():
        try:
            archive = zipfile.ZipFile(images)
        except (zipfile.BadZipFile, OSError) as e:
            raise UserError(images, f"cannot be read as a zip file ({e})", "download it again") from None
        with archive:
            names = {n: n for n in archive.namelist() if not n.endswith("/")}
            names |= {PurePosixPath(n).name: n for n in reversed(list(names)) if PurePosixPath(n).name not in names}
            yield lambda name: of_zip(archive, names.get(name) or names.get(PurePosixPath(name).name))
        return
    if not images.is_dir():
        raise UserError(images, "is no folder and no zip file of pictures", "give --images PATH")
    inner = images / "images"

    def find(name: str) -> Callable[[], bytes]:
        place = images / name
        if not place.is_file() and (inner / name).is_file():
            place = inner / name
        if place.is_file() and not place.resolve().is_relative_to(images.resolve()):
            return _refusing("blocked", "a link that leads out of the image folder")
        return of_file(place)

    yield find


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return list(rows(path))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read as JSON ({e})", "download or copy it again") from None
    if not isinstance(raw, list) or not raw:
        raise UserError(path, "holds no list of records", "see LLaVA's chat.json for the form")
    return raw


def _of_entry(n: int, entry: Any, where: Finder) -> Item:
    raw = entry if isinstance(entry, dict) else {"entry": entry}
    image, id = raw.get("image"), raw.get("id")
    key = str(id) if isinstance(id, str | int) and id != "" else f"{n:06d}"
    named = image if isinstance(image, str) and image else None
    fetch = (
        where(named)
        if named is not None and ".." not in PurePosixPath(named).parts
        else _refusing("dead", "names no picture")
    )
    return Item(key, named, fetch, (raw,), licence=raw.get("licence") if isinstance(raw.get("licence"), str) else None)


def _of_tar(path: Path) -> Iterator[Item]:
    """Samples of a webdataset archive: files that follow one another and share a name up to the first dot."""
    try:
        with tarfile.open(path) as tar:
            key = ""
            parts: dict[str, bytes] = {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if here != key:
                    yield from _of_sample(key, parts, path)
                    key, parts = here, {}
                file = tar.extractfile(member)
                parts[suffix.lower()] = file.read(LARGEST + 1) if file is not None else b""
            yield from _of_sample(key, parts, path)
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(path, f"is not a whole tar file ({e})", "download or copy it again") from None


def _of_sample(key: str, parts: dict[str, bytes], path: Path) -> Iterator[Item]:
    suffix = next((s for s in parts if f".{s}" in EXTENSIONS), None)
    if suffix is not None:
        content = parts[suffix]
        yield _with_sidecars(
            f"{path.stem}-{key}", f"{path.stem}/{key}.{suffix}", _giving(content), parts, f"{path}: {key}"
        )
    elif "json" in parts:
        yield _with_sidecars(
            f"{path.stem}-{key}",
            f"{path.stem}/{key}",
            _refusing("dead", "the archive holds no picture for it"),
            parts,
            f"{path}: {key}",
        )


def _table(path: Path) -> Any:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path, partitioning=None)
        with pa.memory_map(str(path)) as file:  # a data set saved to disk by Hugging Face's library
            return pa.ipc.open_stream(file).read_all()
    except (pa.ArrowException, OSError) as e:
        raise UserError(path, f"cannot be read ({str(e).partition('.')[0]})", "download or copy it again") from None


def _of_table(table: Any, split: str) -> Iterator[Item]:
    """Rows in Hugging Face's form: a picture column; conversations become records; captions, labels, questions become truth."""
    columns = set(table.column_names)
    image = next((c for c in IMAGE_COLUMNS if c in columns), None)
    if image is None:
        raise UserError(
            split, f"no picture column among {', '.join(table.column_names)}", f"rename it to {IMAGE_COLUMNS[0]!r}"
        )
    labels = {c: class_names(table.schema.metadata, c) for c in LABEL_COLUMNS if c in columns}
    for n, row in enumerate(r for batch in table.to_batches(64) for r in batch.to_pylist()):
        cell = row[image] if isinstance(row[image], dict) else {"bytes": row[image]}
        content, stored = cell.get("bytes"), str(cell.get("path") or "")
        content = content if isinstance(content, bytes) else None
        suffix = PurePosixPath(stored).suffix.lower()
        name = f"{split}/{n:07d}{suffix if suffix in EXTENSIONS else ''}"
        fetch = _giving(content) if content else _refusing("dead", "the row holds no picture")
        known: dict[str, Any] = {}
        captions = row.get("captions") or row.get("caption") or row.get("text")
        if captions:
            known["captions"] = [str(c) for c in ([captions] if isinstance(captions, str) else captions)]
        qa = row.get("qa")
        pairs = [q for q in (qa if isinstance(qa, list) else []) if _is_pair(q)]
        if pairs:
            known |= _shape(pairs)
        for c, names in labels.items():
            if (label := _label(row[c], names)) is not None:
                known.setdefault("labels", [label])
        raw = {k: row[k] for k in ("id", "kind", "conversations") if row.get(k)}
        yield Item(str(row.get("id") or f"{split}-{n:07d}"), name, fetch, (raw,) if "conversations" in raw else (), known, row.get("url"), row.get("licence") or row.get("license"))  # fmt: skip


def _is_pair(q: Any) -> bool:
    return isinstance(q, dict) and all(isinstance(q.get(k), str) for k in ("question", "answer"))


def _label(value: Any, names: tuple[str, ...] | None) -> str | None:
    """The class's name; None where there is none: -1, as unlabelled parts have it, or a number beyond the names."""
    if names is not None and isinstance(value, int):
        return names[value].replace("_", " ") if 0 <= value < len(names) else None
    return None if value is None or value == -1 else str(value).replace("_", " ")


def _shape(qa: list[dict[str, str]]) -> dict[str, Any]:
    """easy-VQA's questions as truth: the form and the colour where one of the answers says so, and all pairs."""
    from mllm_fl.annotate.truth import COLOURS, SHAPES

    said = [q["answer"] for q in qa] + [q["question"] for q in qa if q["question"].lower().startswith("what")]
    forms, colours = ([x for text in said for x in words.named(text)] for words in (SHAPES, COLOURS))
    return {"shape": forms[0] if forms else "", "colour": colours[0] if colours else "", "qa": qa}
