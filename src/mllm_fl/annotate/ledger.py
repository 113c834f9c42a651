"""The annotator's memory: what was asked, what came back, what it took. Nothing that was answered is ever asked again.

One SQLite file in WAL mode, one row per (image content, kind, prompt version, model, parameters). A row is claimed before
the question is sent, so that two processes on one ledger share the work instead of doing it twice; the claim of a process that died
is taken over at once on the same machine, after ``LEASE`` seconds otherwise. Failures are kept with their reason and
are asked again on the next run; they are never served as answers.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError

VERSION = 1
LEASE = 900.0  # seconds after which a claim from another machine is taken over

_SCHEMA = """
CREATE TABLE answers (
    image TEXT NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('claimed', 'ok', 'failed')),
    answer TEXT, error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL,
    attempts INTEGER NOT NULL DEFAULT 0, owner TEXT, updated REAL NOT NULL,
    PRIMARY KEY (image, kind, prompt, model, parameters)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Key:
    """What makes two questions the same question. ``image``: SHA-256 of the pixels; ``parameters``: canonical JSON."""

    image: str
    kind: str
    prompt: str
    model: str
    parameters: str

    @property
    def columns(self) -> tuple[str, str, str, str, str]:
        """The five values in the order of the table."""
        return (self.image, self.kind, self.prompt, self.model, self.parameters)


@dataclass(frozen=True)
class Entry:
    """What came of one question: the answered ``texts``, or the reason why there is none."""

    texts: tuple[str, ...] = ()
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def canonical(parameters: Mapping[str, Any]) -> str:
    """Parameters as JSON that is equal for equal values."""
    return json.dumps(parameters, sort_keys=True, ensure_ascii=False)


class Ledger:
    """An open ledger file; made if absent. One object per thread; any number of processes.

    Raises:
        UserError: of another version, not a ledger, or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{born(os.getpid())}.{os.urandom(4).hex()}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._prepare()
        except (sqlite3.Error, OSError) as e:
            raise UserError(
                path, f"cannot be used as a ledger ({e})", "choose another corpus folder, or restore the file"
            ) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if found == 0 and not tables:
                self._db.execute(_SCHEMA)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif found != VERSION or "answers" not in tables:
                raise UserError(
                    self.path,
                    f"ledger of version {found}, this program writes version {VERSION}",
                    "use another corpus folder",
                )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of this process's claims and close the file."""
        try:
            self._db.execute("DELETE FROM answers WHERE status = 'claimed' AND owner = ?", (self.owner,))
        except sqlite3.Error:
            pass  # a claim that stays behind expires by itself
        self._db.close()

    def answers(self, keys: Sequence[Key]) -> dict[Key, tuple[str, ...]]:
        """The answers that are there, by key; failures and claims are not among them."""
        out: dict[Key, tuple[str, ...]] = {}
        for key in keys:
            row = self._row(key)
            if row is not None and row[0] == "ok":
                out[key] = tuple(json.loads(row[1]))
        return out

    def failures(self, keys: Sequence[Key]) -> dict[Key, str]:
        """Why the failed ones of ``keys`` failed the last time."""
        rows = ((key, self._row(key)) for key in keys)
        return {key: str(row[2]) for key, row in rows if row is not None and row[0] == "failed"}

    def claim(self, keys: Sequence[Key]) -> list[Key]:
        """Those of ``keys`` that this process is to ask now: neither answered, nor in the hands of a living process."""
        mine: list[Key] = []
        now = time.time()
        with self._transaction():
            for key in keys:
                row = self._row(key)
                if row is not None and (row[0] == "ok" or (row[0] == "claimed" and self._alive(row[3], row[4], now))):
                    continue
                self._db.execute(
                    "INSERT INTO answers (image, kind, prompt, model, parameters, status, owner, updated) VALUES (?,?,?,?,?,'claimed',?,?)"
                    " ON CONFLICT DO UPDATE SET status = 'claimed', owner = excluded.owner, updated = excluded.updated",
                    (*key.columns, self.owner, now),
                )
                mine.append(key)
        return mine

    def write(self, entries: Iterable[tuple[Key, Entry]]) -> None:
        """Record what came back, all in one transaction; an answer that is already there is never replaced."""
        now = time.time()
        with self._transaction():
            for key, e in entries:
                status = "failed" if e.error is not None else "ok"
                answer = None if e.error is not None else json.dumps(e.texts, ensure_ascii=False)
                self._db.execute(
                    "INSERT INTO answers (image, kind, prompt, model, parameters, status, answer, error, prompt_tokens, completion_tokens,"
                    " seconds, attempts, owner, updated) VALUES (?,?,?,?,?,?,?,?,?,?,?,1,?,?)"
                    " ON CONFLICT DO UPDATE SET status = excluded.status, answer = excluded.answer, error = excluded.error,"
                    " prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens, seconds = excluded.seconds,"
                    " attempts = attempts + 1, owner = excluded.owner, updated = excluded.updated WHERE status != 'ok'",
                    (
                        *key.columns,
                        status,
                        answer,
                        e.error,
                        e.prompt_tokens,
                        e.completion_tokens,
                        e.seconds,
                        self.owner,
                        now,
                    ),
                )

    def usage(self, keys: Sequence[Key]) -> dict[str, float]:
        """Tokens in, tokens out, seconds of answering and questions asked (attempts), summed over ``keys``."""
        total = {"prompt_tokens": 0.0, "completion_tokens": 0.0, "seconds": 0.0, "attempts": 0.0}
        query = (
            f"SELECT {', '.join(total)} FROM answers WHERE image=? AND kind=? AND prompt=? AND model=? AND parameters=?"
        )
        for key in keys:
            row = self._db.execute(query, key.columns).fetchone()
            for name, value in zip(total, row or (), strict=False):
                total[name] += value or 0
        return total

    def _row(self, key: Key) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._db.execute(
            "SELECT status, answer, error, owner, updated FROM answers WHERE image=? AND kind=? AND prompt=? AND model=? AND parameters=?",
            key.columns,
        ).fetchone()
        return row

    def _alive(self, owner: str | None, since: float, now: float) -> bool:
        """Whether a claim holds: its process lives (same machine), or the lease has not run out (another machine)."""
        host, pid, started = (owner or "::").rsplit(":", 2)
        if host == socket.gethostname() and pid.isdigit():
            then = started.partition(".")[0]
            return owner != self.owner and then != "" and born(int(pid)) == then
        return now - since < LEASE

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT: the write lock is taken at once, so that reading and claiming are one step."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def born(pid: int) -> str:
    """A word that tells this process from a later one with the same id; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            fields = f.read().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(pid, 0)  # no /proc: only whether it lives
        return "alive"
    except PermissionError:
        return "alive"
    except OSError:
        return ""
