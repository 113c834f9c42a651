"""What a stage tells while it works. Stages report, the command line draws, the run folder writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Event(NamedTuple):
    """Progress of one stage: ``done`` of ``total`` steps, and a short note such as the latest accuracy."""

    stage: str
    done: int
    total: int
    note: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress callback that shows nothing."""
