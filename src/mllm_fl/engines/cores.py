"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

RUNS = "MLLM_FL_JOBS"
"""Environment variable: how many runs share the machine; ``--jobs N`` sets it for the processes it starts."""


def usable_cores() -> int:
    """Cores that the scheduler lets this process run on, and no more than its control group's quota of time."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no such file, or "max"
    return max(1, cores)


OVER = 4
"""Workers for each usable core, at most: more would compute nothing sooner, and each is a process that loads torch."""


def workers_allowed(asked: int | None) -> int:
    """As many as asked for, but at most ``OVER`` for each usable core; absent means :func:`workers_at_hand`."""
    return workers_at_hand() if asked is None else min(asked, OVER * usable_cores())


def workers_at_hand() -> int:
    """Usable cores, shared between the runs at a time; at least one."""
    runs = os.environ.get(RUNS, "1")
    return max(1, usable_cores() // max(1, int(runs) if runs.isdigit() else 1))
