"""The run folder: what a run was asked, what happened, and where it can be taken up again.

``config.toml`` (feeding it back reproduces the run), ``env.json``, ``manifest.json``, ``rounds.jsonl`` and ``clients.jsonl``
(one row per round, and per round and client: equal bytes for equal runs), ``timings.jsonl`` (seconds: never equal),
``events.jsonl``, ``checkpoint.safetensors``, ``model.safetensors``, and last of all ``final.json``: its presence means finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.toml import dumps, flatten, read_toml

APPENDED = ("rounds.jsonl", "clients.jsonl", "timings.jsonl")


def config_hash(resolved: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a resolved configuration."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two nested configurations differ, each with both values."""
    x, y = flatten(dict(a)), flatten(dict(b))
    return [
        f"{k} ({x.get(k, 'absent')} -> {y.get(k, 'absent')})"
        for k in sorted(x.keys() | y.keys())
        if x.get(k) != y.get(k)
    ]


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
        path: the folder; made if it is not there.
        resolved: the resolved configuration as nested plain values.

    Raises:
        UserError: unwritable, in use by another process, or begun with another configuration (the keys are named).
    """

    def __init__(self, path: Path, resolved: dict[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(path / ".lock"))
            self._lock.acquire(timeout=0)
        except Timeout as e:
            raise UserError(path, "another process is working in this run folder", "wait for it, or stop it") from e
        except OSError as e:
            raise UserError(
                path, f"the run folder cannot be written: {e.strerror}", "choose another with --runs DIR"
            ) from e
        try:
            for leftover in path.glob(".*.tmp-*"):  # of a killed process; the lock says that nobody writes here now
                leftover.unlink()
            config = path / "config.toml"
            self._fresh = not config.exists()
            if not self._fresh:
                diff = differences(read_toml(config), json.loads(json.dumps(resolved)))
                if diff:
                    raise UserError(
                        path, f"was begun with another configuration: {'; '.join(diff)}", "use another folder or name"
                    )
            else:
                write_atomic(config, dumps(resolved).encode())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        refused = self._fresh and kind is not None and issubclass(kind, UserError)
        if refused and {p.name for p in self.path.iterdir()} == {"config.toml", ".lock"}:
            (self.path / "config.toml").unlink()  # before it began: nothing is interrupted here
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    @property
    def final(self) -> dict[str, Any] | None:
        """The finished run's result, or None while it is unfinished."""
        return read_final(self.path / "final.json") if (self.path / "final.json").exists() else None

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as JSON lines and flush them to the disk."""
        with open(self.path / name, "ab") as f:
            for row in rows:
                f.write(json.dumps(row).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl, with the time (seconds since 1970)."""
        self.append("events.jsonl", [{"time": round(time.time(), 3), "event": kind, **fields}])

    def lengths(self) -> dict[str, int]:
        """Bytes of each appended file now; a checkpoint remembers them."""
        return {n: (self.path / n).stat().st_size if (self.path / n).exists() else 0 for n in APPENDED}

    def rewind(self, lengths: Mapping[str, int]) -> None:
        """Cut the appended files back to what they were when a checkpoint was written.

        Raises:
            UserError: a file is shorter than the checkpoint says: somebody changed it.
        """
        for name in APPENDED:
            path, keep = self.path / name, int(lengths.get(name, 0))
            have = path.stat().st_size if path.exists() else 0
            if have < keep:
                raise UserError(
                    path,
                    f"has {have} bytes, but the checkpoint was written when it had {keep}",
                    "restore the file, or delete the run folder",
                )
            if have > keep:
                os.truncate(path, keep)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        write_atomic(self.path / name, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: missing, broken, or JSON of another kind.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(path, "no such file") from e
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(path, f"cannot be read as JSON: {e}", "restore the file, or delete its folder") from e
    if not isinstance(value, dict):
        raise UserError(path, f"holds {type(value).__name__} where an object is expected", "restore the file")
    return value


def read_final(path: Path) -> dict[str, Any]:
    """What a finished run's final.json holds.

    Raises:
        UserError: missing, broken, or not what a finished run writes.
    """
    value = read_json(path)
    missing = [k for k in ("name", "config_hash", "last") if k not in value]
    if missing:
        raise UserError(
            path, f"is no finished run's record: it lacks {missing[0]!r}", "delete it: the run is finished again"
        )
    return value


def read_rows(path: Path, way_out: str = "delete the run folder, or restore the file") -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a missing file has none. ``way_out``: what to do about a broken line.

    Raises:
        UserError: a broken line, with its number.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    try:  # all at once: half the time of line by line
        rows = list(json.loads(b"[" + b",".join(lines) + b"]"))
        if len(rows) == len(lines):
            return rows
    except ValueError:
        pass
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}:{number}", "broken line", way_out) from e
    return rows


def environment() -> dict[str, Any]:
    """Where a run took place: versions, processor, commit, and whether its result is deterministic."""
    import numpy
    import torch

    from mllm_fl import __version__

    return {
        "mllm_fl": __version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "transformers": version("transformers"),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "deterministic": "yes: CPU, named random streams, one thread",
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return out.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(
            (x.split(":", 1)[1].strip() for x in info.splitlines() if x.startswith("model name")), platform.machine()
        )
        kinds = [k for k in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {k}" in info]
        return f"{name} ({', '.join(kinds)})" if kinds else name
    except OSError:
        return platform.processor() or platform.machine()
