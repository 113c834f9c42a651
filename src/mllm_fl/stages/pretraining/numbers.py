"""Names of a corpus, told apart without holding them: a table on the disk, which its file system forgets when it is closed."""

from __future__ import annotations

import sqlite3
from types import TracebackType

from mllm_fl.errors import UserError


class Numbers:
    """Different texts get the numbers 0, 1, ... in the order in which they come. SQLite's own temporary file; a few megabytes are in memory.

    Raises:
        UserError: no room for the temporary file.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": a file that has no name
        self._db.execute("PRAGMA cache_size = -4096")  # kibibytes
        self._db.execute("CREATE TABLE names (name BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")
        self._count = 0

    def __enter__(self) -> Numbers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def of(self, name: str) -> tuple[int, bool]:
        """(the number of ``name``, whether it comes for the first time)."""
        key = name.encode("utf-8", "surrogatepass")
        try:
            row = self._db.execute("SELECT number FROM names WHERE name = ?", (key,)).fetchone()
            if row is not None:
                return int(row[0]), False
            self._db.execute("INSERT INTO names VALUES (?, ?)", (key, self._count))
        except sqlite3.Error as e:
            raise UserError("the folder for temporary files", f"cannot be written ({e})", "make room, or set SQLITE_TMPDIR") from None  # fmt: skip
        self._count += 1
        return self._count - 1, True
