"""Experiment trackers as mirrors of the run folder: TensorBoard, trackio, Weights & Biases. Off unless asked for.

The run folder is the truth; a tracker is shown what it holds, by the process that plays the server and by no other. Each tracker lives in a thread of its
own behind a queue: one that fails, or hangs because the network is gone, is left behind, an event says so, and the run goes on with the same bytes.
A tracker that joins late is shown the rounds so far; one that resumes is not shown a round twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.runs import read_json
from mllm_fl.toml import flatten, read_toml

MARK = ".tracked.json"  # in the run folder: the last round that each tracker was shown
PATIENCE = 30.0  # seconds that the end of a run waits for its trackers


class Tracker(Protocol):
    """What a tracker can do. All calls come from one thread."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin, or take up again, the run in ``folder``; ``config`` is flat, by dotted keys."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one round."""

    def finish(self, summary: Mapping[str, float]) -> None:
        """Numbers of the whole run, empty if it was interrupted; then let go."""


class TensorBoard:
    """Event files in ``<run folder>/tensorboard``; look with ``tensorboard --logdir runs``."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]
        lines = "\n".join(f"    {key} = {value}" for key, value in config.items())
        self._writer.add_text("config", lines, 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, float]) -> None:
        for key, value in summary.items():
            self._writer.add_scalar(f"final/{key}", value, 0)
        self._writer.close()


class Trackio:
    """trackio's local store (its own folder, or TRACKIO_DIR); look with ``trackio show``."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio

        for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "trackio"]:
            vars(module)["print"] = _unheard  # it has no quiet mode, and stdout is the command's own
        self._run: Any = trackio.init(
            project=folder.parent.name,
            name=folder.name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if summary:
            self._run.log({f"final/{key}": value for key, value in summary.items()})
        self._run.finish()


class WandB:
    """Weights & Biases in ``<run folder>/wandb``, offline unless WANDB_MODE says otherwise (``wandb sync`` sends it later)."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=folder.parent.name, name=folder.name, id=folder.name, config=dict(config), dir=str(folder),
            resume="allow", mode=os.environ.get("WANDB_MODE", "offline"), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{key}": value for key, value in summary.items()})
        self._run.finish()


TRACKERS: dict[str, tuple[Callable[[], Tracker], str, str]] = {  # name -> class, package, what to install
    "tensorboard": (TensorBoard, "tensorboard", "mllm-fl[track]"),
    "trackio": (Trackio, "trackio", "mllm-fl[track]"),
    "wandb": (WandB, "wandb", "mllm-fl[wandb]"),
}


def check(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is begun.

    Raises:
        UserError: naming it, and what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError("--track", f"{name!r} is unknown", f"choose {', '.join(TRACKERS)}")
        _, package, install = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--track {name}", f"{package} is not installed", f"pip install '{install}'")


class Mirror:
    """Shows one run folder to trackers: :meth:`look` after each round, :meth:`close` at the end.

    ``say``: hears one line about a tracker that was left behind; the same stands in events.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        say: Callable[[str], None] = lambda line: None,
        patience: float = PATIENCE,
    ) -> None:
        self.folder, self._say, self._patience = folder, say, patience
        shown = _marks(folder)
        self._shown = {name: shown.get(name, 0) for name in names}
        self._threads: dict[str, _Thread] = {}

    def look(self) -> None:
        """Show what rounds.jsonl has gained."""
        rows = _rows(self.folder / "rounds.jsonl")
        for name in list(self._shown):
            fresh = [row for row in rows if int(row["round"]) > self._shown[name]]
            if not fresh:
                continue
            if name not in self._threads:
                self._threads[name] = _Thread(name, self.folder)
            for row in fresh:
                self._threads[name].queue.put((numbers(row), int(row["round"])))
                self._shown[name] = int(row["round"])
        self._drop_failed()

    def close(self) -> None:
        """Show the rest, wait for the trackers, but not for ever, and remember how far they came."""
        self.look()
        final = read_json(self.folder / "final.json") if (self.folder / "final.json").exists() else {}
        until = time.monotonic() + self._patience
        for thread in self._threads.values():
            thread.queue.put((summary(final), None))
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                thread.failure = thread.failure or f"does not answer for {self._patience:g} s"
        self._drop_failed()
        if self._threads:
            done = _marks(self.folder) | {name: thread.done for name, thread in self._threads.items()}
            write_atomic(self.folder / MARK, (json.dumps(done) + "\n").encode())

    def _drop_failed(self) -> None:
        for name, thread in list(self._threads.items()):
            if thread.failure is not None:
                del self._threads[name], self._shown[name]
                _event(self.folder, name, thread.failure)
                self._say(f"--track {name}: left behind ({thread.failure}); the run goes on")


class _Thread(threading.Thread):
    """One tracker, fed by a queue of (values, round); round None ends it."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)  # a tracker that hangs does not keep the process
        self.queue: queue.Queue[tuple[dict[str, float], int | None]] = queue.Queue()
        self.failure: str | None = None
        self.done = 0
        self._kind, self._folder = name, folder
        self.start()

    def run(self) -> None:
        try:
            tracker = TRACKERS[self._kind][0]()
            tracker.start(self._folder, flatten(read_toml(self._folder / "config.toml")))
            while True:
                values, step = self.queue.get()
                if step is None:
                    tracker.finish(values)
                    return
                tracker.log(values, step)
                self.done = step
        except BaseException as e:  # whatever a tracker does, it is not the run's end
            self.failure = " ".join(f"{type(e).__name__}: {e}".split())[:300]


def _unheard(*words: object, **how: object) -> None:
    """Takes the place of ``print``."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of rounds.jsonl."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "round" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def summary(final: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of final.json that a run is quoted with; empty for an unfinished one."""
    paths = {
        "last": ("last", "accuracy"),
        "mean_last": ("mean_last", "mean"),
        "few": ("last", "few"),
        "seconds": ("seconds", "total"),
    }
    out: dict[str, float] = {}
    for name, (table, key) in paths.items():
        found = final.get(table)
        if isinstance(found, Mapping) and isinstance(found.get(key), int | float):
            out[name] = float(found[key])
    return out


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows; one that is being written waits for the next look."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _marks(folder: Path) -> dict[str, int]:
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, int)} if isinstance(found, dict) else {}


def _event(folder: Path, name: str, why: str) -> None:
    line = {"time": round(time.time(), 3), "event": "tracker failed", "tracker": name, "reason": why}
    try:
        with open(folder / "events.jsonl", "ab") as f:
            f.write(json.dumps(line).encode() + b"\n")
    except OSError:
        pass  # the run itself will say that its folder cannot be written
