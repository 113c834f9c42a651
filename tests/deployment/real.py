"""A federation of real processes on the loopback, and a hand that kills them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_fl.deployment import control, follow, layout, processes
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows


class Federation:
    """Two sites and a SuperLink with TLS and node keys; used as a context manager."""

    def __init__(self, folder: Path, config: Path, nodes: int = 2, worker: bool = True) -> None:
        [port] = processes.free_ports(1)
        names = [f"site-{i + 1}" for i in range(nodes)]
        self.made = layout.init(folder, sites=names, config=config, port=port)
        self.worker, self.said, self._open = worker, list[str](), contextlib.ExitStack()
        self.link: processes.Kept
        self.nodes: dict[str, processes.Kept] = {}

    def say(self, line: str) -> None:
        self.said.append(line)

    def __enter__(self) -> Federation:
        try:
            self.link = self._open.enter_context(processes.superlink(self.made, self.say))
            control.wait_ready(self.made, 600)
            control.register(self.made)
            for name in self.made.sites:
                node = layout.Node.read(self.made.site(name))
                if self.worker:
                    self._open.enter_context(processes.worker(node, self.say))
                self.nodes[name] = self._open.enter_context(processes.supernode(node, self.say))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, **values: Any) -> Watch:
        return Watch(self, *follow.start(self.made, follow.settings_of(self.made, **values), self.say))


@contextlib.contextmanager
def memory(otherwise: Path) -> Iterator[Path]:
    """A folder in memory where there is one: Flower gives up when its database has been locked for five seconds, which a busy disk can do to it."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield otherwise
        return
    folder = Path(tempfile.mkdtemp(prefix="mllm-fl-", dir=shared))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(what: Callable[[], Any], seconds: float = 1800.0) -> Any:
    """The first true value of ``what``; the machine may be busy, so the patience is long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen")


def status(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((path / "status.json").read_text())
        return found
    except (OSError, ValueError):
        return {}


def in_round(path: Path, t: int, site: str = "") -> bool:
    """Whether round ``t``'s training is on its way, and this site (or any) has not answered."""
    now = status(path)
    late = now.get("waiting_for", [])
    return now.get("kind") == "train" and now.get("round") == t and (site in late if site else bool(late))


class Watch(threading.Thread):
    """Watches a run to its end and does what the line says when it stops, as its operator would. ``final``: final.json's content; ``lines``: why it stopped.

    A machine may be too busy for Flower, whose SuperLink then stops the run before anybody was killed.
    """

    def __init__(self, fed: Federation, path: Path, number: str) -> None:
        super().__init__(daemon=True)
        self.fed, self.path, self.number = fed, path, number
        self.lines: list[str] = []
        self.final: dict[str, Any] | None = None
        self.problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while self.final is None:
                try:
                    if self.lines:
                        until(lambda: control.ready(self.fed.made))
                        _, _, self.number = follow.resume(self.path, self.fed.say)
                    self.final = follow.follow(self.fed.made, self.path, self.number, self.fed.say)
                except UserError as e:
                    self.lines.append(str(e))
                    if len(self.lines) > 9:
                        raise
        except BaseException as e:
            self.problem = e

    def strike(self, t: int, site: str, hit: Callable[[], bool]) -> float:
        """Wait for the middle of round ``t`` and hit; when that was, in seconds since 1970."""

        def struck() -> bool:
            if not self.is_alive():
                raise AssertionError(f"over before it was struck: {self.problem or self.final}")
            fresh = time.time() - float(status(self.path).get("time", 0)) < 20
            return fresh and in_round(self.path, t, site) and hit()

        until(struck)
        return time.time()

    def end(self) -> dict[str, Any]:
        """final.json's content, when it is there."""
        self.join(3600)
        if self.problem is not None:
            raise self.problem
        assert self.final is not None, "the run does not end"
        return self.final


def went_on(path: Path, t: int, at: float) -> float:
    """When round ``t``'s messages were sent again after ``at``; where they were not, when the last answer to the first ones came. Seconds since 1970."""
    last = [e for e in read_rows(path / "events.jsonl") if e["event"] == "train exchanged" and e["round"] == t][-1]
    sent = float(last["time"]) - float(last["seconds"])
    return sent if sent > at else float(last["time"])


def differing(a: Path, b: Path) -> int:
    """Bytes in which two files differ."""
    one, other = a.read_bytes(), b.read_bytes()
    return sum(x != y for x, y in zip(one, other, strict=False)) + abs(len(one) - len(other))


def kill(kept: processes.Kept, word: str | None = None) -> bool:
    """SIGKILL to the process itself, or to the one below it whose command has ``word``; False where there is none now."""
    assert kept.process is not None
    found = [kept.process.pid] if word is None else [p for p, c in processes.below(kept.process.pid) if word in c]
    try:
        for p in found:
            os.kill(p, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return bool(found)


@contextlib.contextmanager
def cli(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line as a user starts it; ended with all that it started."""
    command = [sys.executable, "-m", "mllm_fl.cli", *words]
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends what it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        processes.end(process)  # type: ignore[arg-type]
