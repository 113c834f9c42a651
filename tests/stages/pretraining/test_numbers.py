"""Names get numbers in the order in which they come, and are not held in memory."""

from __future__ import annotations

import tracemalloc

import pytest

from mllm_fl.errors import UserError
from mllm_fl.stages.pretraining.numbers import Numbers


def test_a_name_keeps_its_number_and_is_new_once() -> None:
    with Numbers() as names:
        assert [names.of(n) for n in ("b", "a", "b", "", "a", "\ud800")] == [
            (0, True),
            (1, True),
            (0, False),
            (2, True),
            (1, False),
            (3, True),
        ]


def test_python_holds_none_of_many_long_names() -> None:
    with Numbers() as names:
        names.of("warm")
        tracemalloc.start()
        for i in range(20_000):  # two megabytes of text
            names.of(f"{i:0100d}")
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert names.of(f"{19_999:0100d}") == (20_000, False)
    assert held < 100_000


def test_a_full_disk_is_one_line() -> None:
    with Numbers() as names:
        names._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(
            UserError, match=r"temporary files.*cannot be written \(.*; make room, or set SQLITE_TMPDIR"
        ):
            all(names.of(f"{i:0100d}") for i in range(1000))
