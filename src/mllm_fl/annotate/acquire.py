"""Getting the open images: every wanted picture has a state, and a retry touches only what is not ok.

``acquired.jsonl`` in the target folder holds a line per picture: ``path`` (relative to the folder), ``state``, ``why``, and what is known of it: ``url``, ``licence``,
``opt_out``, ``sha256`` of the file, ``pixels`` (digest of the decoded picture), ``same_as`` of a duplicate. Only a picture in state *ok* has a file.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from mllm_fl.annotate.records import check_path
from mllm_fl.annotate.truth import rows
from mllm_fl.data.check import prints_of
from mllm_fl.data.decode import THREADS, to_array, to_rgb
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent

FILE = "acquired.jsonl"
STATES = ("ok", "dead", "corrupt", "duplicate", "blocked")
LARGEST = 64 << 20  # bytes of one picture's file; more is refused
NO_ENTRY = (401, 402, 403, 407, 451)  # HTTP: not for us
OPTED_OUT = ("noai", "noimageai", "noindex", "noimageindex")
"""Words in the header X-Robots-Tag by which a site declines; those that img2dataset heeds."""


class Refused(Exception):
    """A picture that cannot be had: ``state`` says why in one word, the text in a few."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state


@dataclass(frozen=True)
class Wanted:
    """One picture: where it is to lie, how to get its bytes (may raise :class:`Refused`), and what its source says of it."""

    path: str
    fetch: Callable[[], bytes]
    url: str | None = None
    licence: str | None = None
    opt_out: bool | None = None


@dataclass(frozen=True)
class Acquired:
    """What became of it: a line of ``acquired.jsonl``."""

    path: str
    state: str
    why: str = ""
    url: str | None = None
    licence: str | None = None
    opt_out: bool | None = None
    sha256: str | None = None
    pixels: str | None = None
    same_as: str | None = None


def acquire(
    wanted: Iterable[Wanted], folder: Path, progress: Progress = silent, *, total: int = 0, threads: int = THREADS
) -> dict[str, Acquired]:
    """Get every picture that is not ok yet; returns what is known of all, in the order wanted.

    Killed at any moment, the same call goes on: a line is added to ``acquired.jsonl`` when the picture's file is whole.

    Raises:
        UserError: a path that leaves the folder, or the folder cannot be written.
    """
    known = read(folder)
    first_of: dict[str | None, str] = {a.pixels: a.path for a in known.values() if a.state == "ok" and a.pixels}
    out: dict[str, Acquired] = {}
    source = iter(wanted)
    with _Journal(folder / FILE) as journal, ThreadPoolExecutor(threads) as pool:
        while part := list(islice(source, 64)):
            for w in part:
                check_path(w.path, f"{folder}: picture {w.path!r}")
            todo = [w for w in part if not _settled(known.get(w.path), known, folder)]
            got = dict(zip((w.path for w in todo), pool.map(_get, todo)))
            for w in part:
                if w.path in got and w.path not in out:
                    known[w.path] = _keep(w, *got[w.path], folder, first_of)
                    journal.add(known[w.path])
                out[w.path] = known[w.path]
            progress(Event("acquire", len(out), total or len(out) + 1, _counts(out.values())))
    write_whole(folder / FILE, "".join(_line(a) for a in {**known, **out}.values()).encode())
    return out


def _settled(a: Acquired | None, known: Mapping[str, Acquired], folder: Path) -> bool:
    """Whether there is nothing to do: it is here, or the picture that it equals is."""
    if a is not None and a.state == "duplicate" and a.same_as is not None:
        a = known.get(a.same_as)
    return a is not None and a.state == "ok" and (folder / a.path).is_file()


def _get(w: Wanted) -> tuple[bytes, Acquired]:
    """The bytes and what they are, decoded once to know that they can be."""
    about = Acquired(w.path, "ok", "", w.url, w.licence, w.opt_out)
    if w.opt_out:
        return b"", replace(about, state="blocked", why="its holder has opted out")
    try:
        content = w.fetch()
    except Refused as e:
        return b"", replace(about, state=e.state, why=str(e))
    if len(content) > LARGEST:
        return b"", replace(about, state="corrupt", why=f"{len(content):,} bytes are more than {LARGEST:,}")
    try:
        pixels = to_array(to_rgb(content))
    except ValueError as e:
        return b"", replace(about, state="corrupt", why=str(e))
    return content, replace(about, sha256=hashlib.sha256(content).hexdigest(), pixels=prints_of(pixels, pixels)[0])


def _keep(w: Wanted, content: bytes, found: Acquired, folder: Path, first_of: dict[str | None, str]) -> Acquired:
    if found.state != "ok":
        return found
    first = first_of.setdefault(found.pixels, w.path)
    if first != w.path:
        return replace(found, state="duplicate", why=f"equals {first}", same_as=first)
    write_whole(folder / w.path, content)
    return found


def _line(a: Acquired) -> str:
    return json.dumps({k: v for k, v in asdict(a).items() if v is not None and v != ""}) + "\n"


class _Journal:
    """Lines that are added and flushed one by one; a half line at the end of an earlier one is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not (text := self.path.read_bytes()).endswith(b"\n") and text:
                os.truncate(self.path, text.rfind(b"\n") + 1)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as e:
            raise UserError(
                self.path, f"cannot be written ({e.strerror})", "choose a writable folder with free space"
            ) from None
        return self

    def add(self, a: Acquired) -> None:
        try:
            self._file.write(_line(a))
            self._file.flush()
        except OSError as e:
            raise UserError(
                self.path, f"cannot be written ({e.strerror})", "make room, and run the same command"
            ) from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(folder: Path) -> dict[str, Acquired]:
    """What is known so far, by path; the last line about a path counts. Empty when nothing was acquired there.

    Raises:
        UserError: a line that is none of ours.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        text = path.read_bytes()
        if not text.endswith(b"\n"):  # the end of a killed process
            text = text[: text.rfind(b"\n") + 1]
        found = [Acquired(**json.loads(line)) for line in text.decode().split("\n") if line]
    except (OSError, ValueError, TypeError) as e:
        raise UserError(
            path, f"cannot be read ({e})", "restore it, or delete it to look at every picture again"
        ) from None
    return {a.path: a for a in found}


def coverage(found: Iterable[Acquired]) -> dict[str, int]:
    """How many were wanted, and how many are in each state."""
    states = [a.state for a in found]
    return {"wanted": len(states), **{s: states.count(s) for s in STATES}}


def _counts(found: Iterable[Acquired]) -> str:
    return ", ".join(f"{n:,} {s}" for s, n in coverage(found).items() if s not in ("wanted", "ok") and n)


def of_file(path: Path) -> Callable[[], bytes]:
    """Fetches a file of this machine."""

    def fetch() -> bytes:
        try:
            if path.stat().st_size > LARGEST:
                raise Refused("corrupt", f"{path.stat().st_size:,} bytes are more than {LARGEST:,}")
            return path.read_bytes()
        except PermissionError:
            raise Refused("blocked", "permission denied") from None
        except OSError as e:
            raise Refused("dead", (e.strerror or str(e)).lower()) from None

    return fetch


def of_zip(archive: zipfile.ZipFile, name: str | None) -> Callable[[], bytes]:
    """Fetches a member of an archive; None: it is not in there. Nothing is unpacked to its own path, and what unfolds beyond the limit is not read."""

    def fetch() -> bytes:
        if name is None:
            raise Refused("dead", "not in the archive")
        if archive.getinfo(name).file_size > LARGEST:
            raise Refused("corrupt", f"{archive.getinfo(name).file_size:,} bytes are more than {LARGEST:,}")
        try:
            with archive.open(name) as f:
                return f.read(LARGEST + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            OSError,
            RuntimeError,
            EOFError,
            NotImplementedError,
        ) as e:
            raise Refused("corrupt", str(e).partition("\n")[0] or "damaged in the archive") from None

    return fetch


def of_url(url: str, timeout: float = 20.0) -> Callable[[], bytes]:
    """Fetches an address by http(s), once; a site that declines by X-Robots-Tag is heeded."""

    def fetch() -> bytes:
        if not url.startswith(("http://", "https://")):
            raise Refused("dead", "no http(s) address")
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"User-Agent": "mllm-fl"}), timeout=timeout
            ) as answer:
                said = " ".join(answer.headers.get_all("X-Robots-Tag") or ()).lower()
                if word := next((w for w in OPTED_OUT if w in said), None):
                    raise Refused("blocked", f"the site says {word}")
                content: bytes = answer.read(LARGEST + 1)
                return content
        except Refused:
            raise
        except urllib.error.HTTPError as e:
            raise Refused("blocked" if e.code in NO_ENTRY else "dead", f"HTTP {e.code}") from None
        except (OSError, ValueError) as e:
            raise Refused("dead", str(getattr(e, "reason", e)).partition("\n")[0] or type(e).__name__) from None
        except Exception as e:  # http.client's errors have no common base that says more
            raise Refused("dead", type(e).__name__) from None

    return fetch


def listed(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a list of addresses: JSONL with ``url`` (and caption, licence), or CC3M's form, caption TAB url a line.

    Raises:
        UserError: it cannot be read, or a line has no address.
    """
    if path.suffix == ".jsonl":
        for n, row in enumerate(rows(path), 1):
            if not isinstance(row.get("url"), str):
                raise UserError(f"{path}: line {n}", "has no 'url'", 'write {"url": "https://..."}')
            yield {k: str(v) for k, v in row.items() if v is not None}
        return
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(path, f"cannot be read ({e})", "give a .jsonl or .tsv file") from None
    for n, line in enumerate(lines, 1):
        caption, tab, url = line.rstrip("\r").rpartition("\t")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{path}: line {n}", "ends in no http(s) address", "write caption TAB url, or a url")
        yield {"url": url, **({"caption": caption} if tab else {})}
