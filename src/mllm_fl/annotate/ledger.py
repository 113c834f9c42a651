"""The annotator's memory: what was asked, what came back, what it cost. Nothing that was answered is ever asked again.

One SQLite file in WAL mode, one row per (image content, kind, prompt version, model, parameters). A row is claimed before
the question is sent, so that two processes on one ledger share the work instead of doing it twice; the claim of a process that died
is taken over at once on the same machine, after ``LEASE`` seconds otherwise; what lies in a submitted batch stays claimed until
the batch ends. Failures are kept with their reason and are asked again on the next run; they are never served as answers.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_fl.annotate.ledger_file import VERSION, Writing, born, connect
from mllm_fl.errors import UserError

__all__ = ["LEASE", "VERSION", "Entry", "Key", "Ledger", "Totals", "born", "canonical", "printable"]
LEASE = 900.0  # seconds after which a claim from another machine is taken over, unless it was renewed
BATCH = "batch:"  # the owner of what lies in a submitted batch begins so

_WHERE = "image=? AND kind=? AND prompt=? AND model=? AND parameters=?"
_WRITE = """
INSERT INTO answers (image, kind, prompt, model, parameters, status, answer, error, prompt_tokens, completion_tokens, seconds, attempts,
    owner, updated, cost, provenance, source, licence) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)
ON CONFLICT DO UPDATE SET status = excluded.status, answer = excluded.answer, error = excluded.error,
    prompt_tokens = coalesce(prompt_tokens, 0) + excluded.prompt_tokens,
    completion_tokens = coalesce(completion_tokens, 0) + excluded.completion_tokens,
    seconds = coalesce(seconds, 0) + excluded.seconds, attempts = attempts + excluded.attempts, owner = excluded.owner,
    updated = excluded.updated, cost = coalesce(cost + excluded.cost, cost, excluded.cost), provenance = excluded.provenance,
    source = excluded.source, licence = excluded.licence
WHERE status != 'ok'
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
    """What came of one question: the answered ``texts``, or the reason why there is none.

    ``requests``: how many calls were answered for it, usable or not; ``cost`` is theirs, in the price table's currency, None where no
    price is known. ``partial``: the first of several answers; the question stays claimed. A failure may keep such ``texts``
    too: they are asked for no second time. ``source`` and ``licence`` are the picture's.
    """

    texts: tuple[str, ...] = ()
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float | None = None
    requests: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Totals:
    """Everything that the ledger's questions took so far, of all runs and processes."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


def canonical(parameters: Mapping[str, Any]) -> str:
    """Parameters as JSON that is equal for equal values."""
    return json.dumps(parameters, sort_keys=True, ensure_ascii=False)


def printable(text: str) -> str:
    """The text with halves of characters (lone surrogates: cut-off emoji, file names that are no UTF-8) as question marks."""
    return text.encode("utf-8", "replace").decode()


class Ledger:
    """An open ledger file; made if absent, brought up to date if older. One object per thread; any number of processes.

    Raises:
        UserError: of another version, not a ledger, or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{born(os.getpid())}.{os.urandom(4).hex()}"
        self._db = connect(path)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of this process's claims and close the file."""
        try:
            self.release(self.owner)
            self.sync()
        except UserError:
            pass  # a claim that stays behind expires by itself
        self._db.close()

    def release(self, owner: str) -> None:
        """Let go of the claims of ``owner``: what was never answered leaves no row, what failed before is a failure again."""
        with self._writing():
            mine = "status = 'claimed' AND owner = ?"
            self._db.execute(f"DELETE FROM answers WHERE {mine} AND attempts = 0 AND answer IS NULL", (owner,))
            self._db.execute(
                f"UPDATE answers SET status = 'failed', error = coalesce(error, 'interrupted') WHERE {mine}", (owner,)
            )

    def sync(self) -> None:
        """Make what was committed survive a loss of power; a killed process loses nothing without it."""
        for name in (f"{self.path}-wal", str(self.path)):
            try:
                file = os.open(name, os.O_RDONLY)
            except OSError:
                continue
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def answers(self, keys: Sequence[Key]) -> dict[Key, tuple[str, ...]]:
        """The answers that are there, by key; failures and claims are not among them."""
        rows = ((key, self._row(key)) for key in keys)
        return {key: tuple(json.loads(row[1])) for key, row in rows if row is not None and row[0] == "ok"}

    def answered(self, keys: Iterable[Key]) -> Iterator[Key]:
        """Those of ``keys`` that have an answer, one by one."""
        return (key for key in keys if (row := self._row(key)) is not None and row[0] == "ok")

    def partial(self, keys: Sequence[Key]) -> dict[Key, tuple[str, ...]]:
        """The first answers of those that have not all of theirs yet."""
        rows = ((key, self._row(key)) for key in keys)
        return {key: tuple(json.loads(row[1])) for key, row in rows if row is not None and row[0] != "ok" and row[1]}

    def failures(self, keys: Sequence[Key]) -> dict[Key, str]:
        """Why the failed ones of ``keys`` failed the last time."""
        rows = ((key, self._row(key)) for key in keys)
        return {key: str(row[2]) for key, row in rows if row is not None and row[0] == "failed"}

    def claim(self, keys: Sequence[Key], owner: str | None = None) -> list[Key]:
        """Those of ``keys`` that this process (or ``owner``) is to ask now: neither answered, nor in living hands."""
        mine: list[Key] = []
        now = time.time()
        with self._writing():
            for key in keys:
                row = self._row(key)
                if row is not None and (row[0] == "ok" or (row[0] == "claimed" and self._alive(row[3], row[4], now))):
                    continue
                self._db.execute(
                    "INSERT INTO answers (image, kind, prompt, model, parameters, status, owner, updated) VALUES (?,?,?,?,?,'claimed',?,?)"
                    " ON CONFLICT DO UPDATE SET status = 'claimed', owner = excluded.owner, updated = excluded.updated",
                    (*key.columns, owner or self.owner, now),
                )
                mine.append(key)
        return mine

    def renew(self) -> None:
        """Say that this process still works on its claims; to be called well within ``LEASE`` seconds."""
        with self._writing():
            self._db.execute(
                "UPDATE answers SET updated = ? WHERE status = 'claimed' AND owner = ?", (time.time(), self.owner)
            )

    def write(self, entries: Iterable[tuple[Key, Entry]], merged: str | None = None) -> None:
        """Record what came back, all in one transaction; an answer that is already there is never replaced.

        ``merged``: the batch that these are all answers of, which is over with this.

        Raises:
            UserError: the disk is full or read-only. What was written before stays.
        """
        now = time.time()
        with self._writing():
            for key, e in entries:
                status = "claimed" if e.partial else "failed" if e.error is not None else "ok"
                answer = printable(json.dumps(e.texts, ensure_ascii=False)) if e.texts or status == "ok" else None
                self._db.execute(
                    _WRITE,
                    (
                        *key.columns, status, answer, None if e.error is None else printable(e.error), e.prompt_tokens, e.completion_tokens, e.seconds, 0 if e.partial else 1,
                        self.owner, now, e.cost, printable(canonical(e.provenance)) if e.provenance else None, printable(e.source), printable(e.licence),
                    ),
                )  # fmt: skip
                self._db.execute(
                    "UPDATE totals SET requests = requests + ?, prompt_tokens = prompt_tokens + ?,"
                    " completion_tokens = completion_tokens + ?, cost = cost + ?",
                    (e.requests, e.prompt_tokens, e.completion_tokens, e.cost or 0.0),
                )
            if merged is not None:
                self._db.execute("UPDATE batches SET state = 'merged', updated = ? WHERE id = ?", (now, merged))

    def open(self, key: Key) -> bool:
        """Whether ``key`` waits to be asked: neither answered, nor in living hands."""
        row = self._row(key)
        return row is None or not (row[0] == "ok" or (row[0] == "claimed" and self._alive(row[3], row[4], time.time())))

    def held(self, owner: str) -> list[Key]:
        """What ``owner`` has claimed."""
        query = "SELECT image, kind, prompt, model, parameters FROM answers WHERE status = 'claimed' AND owner = ?"
        return [Key(*row) for row in self.select(query, (owner,))]

    def select(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        """Rows of a query, for the tables that other modules keep in this file."""
        return list(self._db.execute(query, tuple(values)))

    def change(self, statement: str, values: Sequence[object]) -> None:
        """One statement in its own transaction, for the tables that other modules keep in this file."""
        with self._writing():
            self._db.execute(statement, tuple(values))

    def totals(self) -> Totals:
        """What everything took, what failed and what came too late included."""
        row = self._db.execute("SELECT requests, prompt_tokens, completion_tokens, cost FROM totals").fetchone()
        return Totals(*row)

    def usage(self, keys: Sequence[Key]) -> dict[str, float | None]:
        """Tokens in, tokens out, seconds of answering, questions asked (attempts) and cost (None: not known), summed over ``keys``."""
        total = {"prompt_tokens": 0.0, "completion_tokens": 0.0, "seconds": 0.0, "attempts": 0.0, "cost": 0.0}
        priced = False
        for key in keys:
            query = f"SELECT {', '.join(total)} FROM answers WHERE {_WHERE}"
            row = self._db.execute(query, key.columns).fetchone() or (None,) * len(total)
            priced = priced or row[-1] is not None
            for name, value in zip(total, row, strict=True):
                total[name] += value or 0
        return {**total, "cost": total["cost"] if priced else None}

    def rows(self, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """The whole rows of ``keys`` that are there, as plain values by column."""
        for key in keys:
            found = self._db.execute(f"SELECT * FROM answers WHERE {_WHERE}", key.columns)
            row = found.fetchone()
            if row is not None:
                yield dict(zip((c[0] for c in found.description), row, strict=True))

    def means(self, model: str, kind: str) -> tuple[int, float, float, float]:
        """Of the answers of this kind by this model: how many, mean tokens in, mean tokens out, mean seconds."""
        row = self._db.execute(
            "SELECT count(*), avg(prompt_tokens), avg(completion_tokens), avg(seconds) FROM answers"
            " WHERE model = ? AND kind = ? AND status = 'ok'",
            (model, kind),
        ).fetchone()
        return int(row[0]), float(row[1] or 0), float(row[2] or 0), float(row[3] or 0)

    def _row(self, key: Key) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._db.execute(
            f"SELECT status, answer, error, owner, updated FROM answers WHERE {_WHERE}", key.columns
        ).fetchone()
        return row

    def _alive(self, owner: str | None, since: float, now: float) -> bool:
        """Whether a claim holds: its process lives (same machine), the lease has not run out (another), or it lies in a batch."""
        if (owner or "").startswith(BATCH):
            return True
        host, pid, started = (owner or "::").rsplit(":", 2)
        if host == socket.gethostname() and pid.isdigit():
            then = started.partition(".")[0]
            return owner != self.owner and then != "" and born(int(pid)) == then
        return now - since < LEASE

    def _writing(self) -> Writing:
        return Writing(self._db, self.path)
