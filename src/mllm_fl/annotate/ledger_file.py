"""The ledger's file: its tables, its version, how an older one is brought up to date, and who on this machine is alive."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from mllm_fl.errors import UserError

VERSION = 2

_ANSWERS = """
CREATE TABLE answers (
    image TEXT NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('claimed', 'ok', 'failed')),
    answer TEXT, error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL,
    attempts INTEGER NOT NULL DEFAULT 0, owner TEXT, updated REAL NOT NULL,
    cost REAL, provenance TEXT, source TEXT, licence TEXT,
    PRIMARY KEY (image, kind, prompt, model, parameters)
) WITHOUT ROWID
"""
_SECOND = (
    """
CREATE TABLE totals (
    one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cost REAL NOT NULL
)""",
    """
INSERT INTO totals SELECT 1, coalesce(sum(attempts), 0), coalesce(sum(prompt_tokens), 0),
    coalesce(sum(completion_tokens), 0), 0 FROM answers
""",
    """
CREATE TABLE batches (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, file TEXT, batch TEXT, requests INTEGER NOT NULL, reserved REAL NOT NULL,
    note TEXT, updated REAL NOT NULL
)""",
)
"""What version 2 added beside the columns cost, provenance, source, licence: the bill of everything, and submitted batches."""


class Transaction:
    """BEGIN IMMEDIATE ... COMMIT: the write lock is taken at once, so that reading and claiming are one step."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._db.execute("COMMIT")
        elif self._db.in_transaction:
            self._db.execute("ROLLBACK")


class Writing(Transaction):
    """A transaction whose troubles with the disk are one line."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        super().__init__(db)
        self._path = path

    def __enter__(self) -> None:
        try:
            super().__enter__()
        except sqlite3.Error as e:
            raise self._said(e) from None

    def __exit__(self, kind: object, found: object = None, *_: object) -> None:
        try:
            super().__exit__(kind)
        except sqlite3.Error as e:
            raise self._said(e) from None
        if isinstance(found, sqlite3.Error):
            raise self._said(found) from None

    def _said(self, e: sqlite3.Error) -> UserError:
        way_out = "what was answered before is kept; make room or make it writable, then run the same command"
        return UserError(self._path, f"cannot be written ({e})", way_out)


def connect(path: Path) -> sqlite3.Connection:
    """The ledger at ``path``, made if absent, brought up to date if of version 1.

    A commit survives the death of the process at once; :meth:`Ledger.sync` makes it survive the loss of power.

    Raises:
        UserError: of another version, not a ledger, or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=60, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        with Transaction(db):
            _prepare(db, path)
    except (sqlite3.Error, OSError) as e:
        way_out = "choose another corpus folder, or restore the file"
        raise UserError(path, f"cannot be used as a ledger ({e})", way_out) from None
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    found = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if found == VERSION and "answers" in tables:
        return
    if found == 1 and "answers" in tables:
        for column in ("cost REAL", "provenance TEXT", "source TEXT", "licence TEXT"):
            db.execute(f"ALTER TABLE answers ADD COLUMN {column}")
    elif found == 0 and not tables:
        db.execute(_ANSWERS)
    else:
        problem = f"ledger of version {found}, this program writes version {VERSION}"
        raise UserError(path, problem, "use another corpus folder, or the program that wrote it")
    for statement in _SECOND:
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


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
