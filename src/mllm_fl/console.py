"""What a person sees while stages work: bars with time left in a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

from mllm_fl.events import Event, Progress


class Screen:
    """Draws the events of one or several runs. ``json_lines`` writes them as JSON on stdout for a parent process instead."""

    def __init__(self, json_lines: bool = False) -> None:
        self.json_lines = json_lines
        self._bars: Any = None
        self._tasks: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], float] = {}

    def __enter__(self) -> Screen:
        if not self.json_lines and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            except ImportError:
                return self
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=18), TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.json_lines:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, label: str) -> Progress:
        """The callback that draws one run's events under ``label``."""
        return lambda event: self.draw(label, event)

    def draw(self, label: str, event: Event) -> None:
        """Show one event."""
        if self.json_lines:
            print(json.dumps({"label": label, **event._asdict()}), flush=True)
            return
        key = (label, event.stage)
        if self._bars is not None:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"{label} · {event.stage}", total=event.total, note="")
            self._bars.update(self._tasks[key], completed=event.done, total=event.total, note=event.note)
            return
        now = time.monotonic()
        first = self._last.setdefault(key, 0.0) == 0.0
        if first or event.done >= event.total or now - self._last[key] >= 10:
            self._last[key] = now
            print(
                f"{label} · {event.stage} {event.done}/{event.total} {event.note}".rstrip(), file=sys.stderr, flush=True
            )
