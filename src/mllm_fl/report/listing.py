"""Run folders as a list: state, progress and headline of each, without reading more than that takes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm_fl.errors import UserError
from mllm_fl.report.table import MISSING, columns, number, plain
from mllm_fl.runs import read_final
from mllm_fl.toml import flatten, read_toml

STATES = ("finished", "running", "interrupted", "broken")
LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Entry:
    """One run folder. ``accuracy``: of the headline's rule, a fraction; ``rule``: which accuracy that is, or what is broken."""

    folder: Path
    state: str
    done: int
    rounds: int | None
    accuracy: float | None
    rule: str


def entries(root: Path) -> list[Entry]:
    """All run folders below ``root``, in the order of their paths.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not root.is_dir():
        raise UserError(root, "no such folder", "give the folder that holds the runs (default: ./runs)")
    found = [_entry(config.parent) for config in sorted(root.glob("**/config.toml"))]
    if not found:
        raise UserError(root, "no run folder here (none holds a config.toml)", "`mllm-fl run CONFIG` makes one")
    return found


def _entry(folder: Path) -> Entry:
    try:
        rounds = flatten(read_toml(folder / "config.toml")).get("federate.rounds")
        total = rounds if isinstance(rounds, int) else None
        if (folder / "final.json").exists():
            return _finished(folder, read_final(folder / "final.json"), total)
        done, latest = _progress(folder / "rounds.jsonl")
        return Entry(
            folder, "running" if is_held(folder / ".lock") else "interrupted", done, total, latest, "latest round"
        )
    except UserError as e:
        return Entry(folder, "broken", 0, None, None, str(e).removeprefix(f"{folder}{os.sep}"))


def _finished(folder: Path, final: dict[str, Any], total: int | None) -> Entry:
    rounds = number(final, "rounds")
    done = total or 0 if rounds is None else int(rounds)
    mean, last = number(final, "mean_last", "mean"), number(final, "last", "accuracy")
    window = number(final, "mean_last", "rounds")
    if mean is not None and final.get("curve") != "unaligned":
        rule = (
            "mean of the last rounds" if window is None else f"mean of the last {min(window, done or window):g} rounds"
        )
        return Entry(folder, "finished", done, total, mean, rule)
    return Entry(folder, "finished", done, total, last, "last round")


def _progress(path: Path) -> tuple[int, float | None]:
    """Whole rows of rounds.jsonl, and the accuracy of the last evaluated one; a row being written does not count."""
    if not path.exists():
        return 0, None
    lines = path.read_bytes().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            accuracy = number(json.loads(line), "accuracy")
        except (ValueError, AttributeError):
            raise UserError(path, "a broken line", "restore the file, or delete the run folder") from None
        if accuracy is not None:
            return len(lines), accuracy
    return len(lines), None


def is_held(lock: Path) -> bool:
    """Whether a living process holds the lock of a run folder. Linux tells without touching it; elsewhere it is tried for a moment."""
    if not lock.exists():
        return False
    try:
        held = LOCKS.read_text()
    except OSError:
        try:
            with FileLock(str(lock), timeout=0):
                return False
        except Timeout:
            return True
    status = lock.stat()
    key = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(key in line.split() and "->" not in line for line in held.splitlines())


def to_text(found: Sequence[Entry], root: Path) -> str:
    """One line a run, and a last one that counts the states."""
    rows = []
    for e in found:
        of = MISSING if e.rounds is None else str(e.rounds)
        value = MISSING if e.accuracy is None else f"{100 * e.accuracy:.1f} %"
        said = e.rule if e.accuracy is not None or e.state == "broken" else ""
        rows.append((plain(str(e.folder.relative_to(root))), e.state, f"{e.done}/{of}", value, plain(said)))
    head = ("run", "state", "rounds", "accuracy", "of the")
    sizes = [max(map(columns, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(c + " " * (n - columns(c)) for c, n in zip(row, sizes, strict=True)).rstrip() for row in (head, *rows)
    ]
    counts = [f"{n} {state}" for state in STATES if (n := sum(e.state == state for e in found))]
    return "\n".join([*lines, ", ".join(counts)])
