"""The open images as they lie in the corpus folder: which files, their pixels' hashes, and what became of every one.

``pictures.jsonl`` has a line per picture of the source: ``source`` (its path there), ``state`` (ok, corrupt, or what the acquisition said),
``why``, ``image`` (its path in the corpus), ``sha256`` (of the pixels), ``licence``, ``url``; and, so that a second start decodes nothing
again, the source file's ``bytes``, ``changed`` (nanoseconds) and ``file`` (SHA-256).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_fl.annotate.backends.base import png
from mllm_fl.data.decode import EXTENSIONS, THREADS, fit, to_array, to_rgb
from mllm_fl.data.files import write_whole
from mllm_fl.data.folder import image_files
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.seeds import numpy_stream

FILE = "pictures.jsonl"
_KEPT = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}  # formats whose files go into the corpus as they are


@dataclass
class OpenImages:
    """In order: relative path in the corpus, SHA-256 of the pixels, where it is from; ``scenes`` by path, ``unreadable`` by source."""

    paths: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)
    scenes: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Which open images: ``where`` is "glyphs" or ``folder:PATH``, ``count`` of them, ``size`` pixels a side or None as they are."""

    where: str
    count: int
    size: int | None
    seed: int
    licence: str = ""

    @property
    def root(self) -> Path | None:
        """The folder; None for rendered pictures."""
        return None if self.where == "glyphs" else Path(self.where.removeprefix("folder:"))

    def files(self) -> list[Path]:
        """The image files that the corpus takes: those that are there and, if they were acquired, in order."""
        assert self.root is not None
        found = image_files(self.root)
        if known := self._acquired():
            found = [f for f in found if known.get(str(f.relative_to(self.root)), {}).get("state", "ok") == "ok"]
        if len(found) > self.count:
            drawn = numpy_stream(self.seed, "open-images").permutation(len(found))[: self.count]
            found = [found[i] for i in sorted(int(j) for j in drawn)]
        return found

    def _acquired(self) -> dict[str, dict[str, Any]]:
        if self.root is None or not (self.root / "acquired.jsonl").exists():
            return {}
        return {str(row.get("path")): row for row in _lines(self.root / "acquired.jsonl")}

    def digest(self, folder: Path) -> str | None:
        """SHA-256 over names and contents of the files; None when they are not there. What ``folder`` knows is not read again."""
        if self.root is None or not self.root.is_dir():
            return None
        known = _known(folder)
        h = hashlib.sha256()
        for path in self.files():
            name = str(path.relative_to(self.root))
            row = known.get(name)
            if row is None or not _unchanged(path, row):
                row = {"file": hashlib.sha256(_bytes(path)).hexdigest()}
            h.update(f"{name} {row['file']}\n".encode("utf-8", "surrogateescape"))
        return h.hexdigest()


def lay_out(source: Source, folder: Path, progress: Progress = silent) -> OpenImages:
    """Put the open images into ``folder/images``; a file's name holds its hash, so one that is there is right.

    Files of PNG, JPEG and WebP that are to keep their size are copied as they are; others become PNG.

    Raises:
        UserError: no such folder, no readable image, nothing can be written.
    """
    rows = list(_of_glyphs(source, folder) if source.root is None else _of_files(source, folder, progress))
    out = OpenImages(coverage=dict(Counter(str(row["state"]) for row in rows)))
    for row in rows:
        if row["state"] == "ok":
            out.paths.append(row["image"])
            out.hashes.append(row["sha256"])
            out.sources.append(row["source"])
            out.licences.append(row.get("licence", ""))
            if "scene" in row:
                out.scenes[row["image"]] = row.pop("scene")
        elif row["state"] == "corrupt":
            out.unreadable[row["source"]] = row["why"]
    if not out.paths:
        why = next(iter(out.unreadable.items()), None)
        problem = f"no readable image (first: {why[0]}: {why[1]})" if why else "no image"
        raise UserError(source.where, problem, f"images end in {', '.join(EXTENSIONS)}")
    write_whole(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if out.scenes:
        lines = "".join(json.dumps({"image": p, **s}) + "\n" for p, s in out.scenes.items())
        write_whole(folder / "scenes.jsonl", lines.encode())
    return out


def _of_glyphs(source: Source, folder: Path) -> Iterator[dict[str, Any]]:
    images, found = render_glyphs(source.count, source.seed, image_size=source.size or 16)
    for i, scene in enumerate(found):
        pixels = images.read([i])[0]
        sha = pixel_hash(pixels.numpy())
        path = f"images/{i:06d}-{sha[:12]}.png"
        if not (folder / path).exists():
            write_whole(folder / path, png(pixels))
        yield {"source": f"glyph {i}", "state": "ok", "image": path, "sha256": sha, "scene": scene.to_json()}


def _of_files(source: Source, folder: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    root = source.root
    if root is None or not root.is_dir():
        raise UserError("annotate.source", f"{root} is not a folder", "give folder:PATH of the open images")
    files, known, acquired = source.files(), _known(folder), source._acquired()
    count = 0
    for name, row in acquired.items():
        if row.get("state") != "ok":
            yield {"source": name, **{k: row[k] for k in ("state", "why", "licence", "url") if row.get(k)}}
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), 32 * THREADS):
            part = files[start : start + 32 * THREADS]
            read = list(pool.map(lambda path: _read(path, root, source, known, folder), part))
            writes = []
            for row, content in read:
                extra = acquired.get(row["source"], {})
                row |= {k: extra[k] for k in ("licence", "url") if extra.get(k)}
                if source.licence:
                    row.setdefault("licence", source.licence)
                if row["state"] == "ok":
                    row["image"] = f"images/{count:06d}-{row['sha256'][:12]}{row.pop('suffix')}"
                    count += 1
                    writes.append((row["image"], content, root / row["source"]))
            list(pool.map(lambda one: _write(folder / one[0], one[1], one[2], source.size), writes))
            progress(Event("pictures", start + len(part), len(files)))
            yield from (row for row, _ in read)


def _read(
    path: Path, root: Path, source: Source, known: Mapping[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, Any], bytes | None]:
    """The row of one file, and what is to be written; nothing where the corpus has it."""
    name = str(path.relative_to(root))
    row = known.get(name)
    if row is not None and row["state"] == "ok" and _unchanged(path, row) and (folder / row["image"]).exists():
        return {**row, "suffix": Path(row["image"]).suffix}, None
    try:
        stat = path.stat()
        content = path.read_bytes()
        drawn, keep = to_rgb(content), _kept(content)
    except (ValueError, OSError) as e:
        return {"source": name, "state": "corrupt", "why": str(e)}, None
    if source.size is not None:
        drawn, keep = fit(drawn, source.size), None
    about = {"bytes": stat.st_size, "changed": stat.st_mtime_ns, "file": hashlib.sha256(content).hexdigest()}
    sha = pixel_hash(to_array(drawn))
    if keep is None:
        out = io.BytesIO()
        drawn.save(out, "PNG")
        content = out.getvalue()
    return {"source": name, "state": "ok", "sha256": sha, "suffix": keep or ".png", **about}, content


def _write(path: Path, content: bytes | None, origin: Path, size: int | None) -> None:
    if path.exists():
        return
    if content is None:  # known under another number: other files came or went
        drawn = to_rgb(origin)
        out = io.BytesIO()
        if size is None and (found := origin.read_bytes()) and _kept(found):
            out.write(found)
        else:
            (drawn if size is None else fit(drawn, size)).save(out, "PNG")
        content = out.getvalue()
    write_whole(path, content)


def _kept(content: bytes) -> str | None:
    """The suffix of a file that any reader decodes to the same upright RGB picture; None for what is to become PNG."""
    with Image.open(io.BytesIO(content)) as found:
        plain = found.mode in ("RGB", "L") and getattr(found, "n_frames", 1) == 1 and "transparency" not in found.info
        return _KEPT.get(str(found.format)) if plain and found.getexif().get(0x0112, 1) == 1 else None


def pixel_hash(pixels: np.ndarray) -> str:
    """SHA-256 of uint8 pixels (3, height, width) and their shape, as ``ImageSet.hashes`` has it."""
    x = np.ascontiguousarray(pixels)
    return hashlib.sha256(repr(x.shape).encode() + x.tobytes()).hexdigest()


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    return {str(row["source"]): row for row in _lines(path) if "source" in row} if path.exists() else {}


def _unchanged(path: Path, row: Mapping[str, Any]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (row.get("bytes"), row.get("changed"))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # the annotation lists it as unreadable


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    rows = []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # the last line of a killed process may be half
    for i, line in enumerate(whole.split("\n")[:-1]):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}: line {i + 1}", "is not JSON", "restore the file, or delete it") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows
