"""The ledger's table of batches: what was written, uploaded and handed in, so that no kill pays for a file twice."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from mllm_fl.annotate.ledger import Ledger


@dataclass(frozen=True)
class Batch:
    """``state``: writing, written, uploaded, submitted or merged. ``file`` and ``batch`` are the endpoint's names; ``reserved``: cost at most."""

    id: str
    state: str
    file: str | None = None
    batch: str | None = None
    requests: int = 0
    reserved: float = 0.0


class Batches:
    """The batches of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def all(self, *states: str) -> list[Batch]:
        """Those in these states, oldest first."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT id, state, file, batch, requests, reserved FROM batches WHERE state IN ({marks}) ORDER BY id"
        return [Batch(*row) for row in self._ledger.select(query, states)]

    def begin(self) -> str:
        """A new batch that is being written; returns its id."""
        name = f"{time.time_ns():020d}-{os.urandom(3).hex()}"
        self._ledger.change("INSERT INTO batches VALUES (?, 'writing', NULL, NULL, 0, 0, NULL, ?)", (name, time.time()))
        return name

    def set(self, id: str, state: str, **values: object) -> Batch:
        """The batch in its new state."""
        columns = "".join(f", {name} = ?" for name in values)
        self._ledger.change(
            f"UPDATE batches SET state = ?, updated = ?{columns} WHERE id = ?",
            (state, time.time(), *values.values(), id),
        )
        return next(b for b in self.all(state) if b.id == id)

    def drop(self, batch: Batch) -> None:
        """Forget a batch that was never handed in; its questions are open again."""
        self._ledger.release(f"batch:{batch.id}")
        self._ledger.change("DELETE FROM batches WHERE id = ?", (batch.id,))
