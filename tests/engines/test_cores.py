"""Cores: what the scheduler and the runs beside us leave."""

from __future__ import annotations

import os

import pytest

from mllm_fl.engines import cores


def test_runs_at_a_time_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    for runs, expected in (("1", 8), ("2", 4), ("3", 2), ("16", 1), ("0", 8), ("many", 8)):
        monkeypatch.setenv(cores.RUNS, runs)
        assert cores.workers_at_hand() == expected, runs
    monkeypatch.delenv(cores.RUNS)
    assert cores.workers_at_hand() == 8


def test_no_more_cores_than_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
        assert cores.usable_cores() == 1


def test_more_workers_than_cores_can_use_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    monkeypatch.delenv(cores.RUNS, raising=False)
    assert [cores.workers_allowed(n) for n in (None, 1, 8, 9, 100_000)] == [2, 1, 8, 8, 8]
