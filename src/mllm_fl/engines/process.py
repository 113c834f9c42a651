"""A worker process as its parent sees it, and the jobs that it is given."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from mllm_fl.engines import channel

_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from mllm_fl.engines.worker import main; main({fd}, {life})"
)
QUICK = 0.2  # seconds: a worker whose last job took less has the next one lying ready while it works
BUFFER = (
    4 << 20
)  # bytes that we ask the system to hold for each worker, so that neither side waits for the other to read
ENVIRONMENT = {  # freed memory is kept for the next step instead of being given back and faulted in again
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@dataclass
class Job:
    """One client to train or to ask, or some images to test.

    ``keep``: (kind, number) of each thing that it has in common with others, see :meth:`mllm_fl.engines.pool.Pool.common`. ``size``: larger
    ones are begun first. ``who``: the words for it; ``fields``: those of an event about it.
    """

    kind: str
    args: tuple[Any, ...]
    keep: tuple[tuple[str, int], ...]
    size: int
    who: str
    fields: dict[str, Any]
    died: list[int] = field(default_factory=list)
    batch: int = 0
    number: int = 0


class Failed(Exception):
    """A job raised in its worker; ``kind``: "failed", "refused" (a UserError) or "broken" (it cannot be read there).

    ``traceback`` is what Python said there.
    """

    def __init__(self, job: Job, kind: str, said: str, traceback: str) -> None:
        super().__init__(said)
        self.job, self.kind, self.said, self.traceback = job, kind, said, traceback


class Process:
    """``under``: the jobs that it was given and has not answered, in order: it works on the first."""

    def __init__(self) -> None:
        ours, theirs = Pipe(duplex=True)
        read, self.life = os.pipe()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.conn: Connection = ours
        self.has: set[int] = set()
        self.kept: dict[str, int] = {}
        self.under: deque[Job] = deque()
        self.room = min(_widened(ours), _widened(theirs))
        self._quick, self._last = False, 0
        path = os.pathsep.join([p for p in sys.path if p])
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
        code = _START.format(fd=theirs.fileno(), life=read)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=env, pass_fds=(theirs.fileno(), read),
                stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors,
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(read)

    @property
    def depth(self) -> int:
        """How many jobs it should have: a second one where waiting for it would be a good part of the work."""
        return 2 if self._quick else 1

    def takes(self, size: int) -> bool:
        """Whether a message of ``size`` bytes can be sent now without waiting until it is read: a worker that answers reads nothing."""
        return not self.under or size <= self.room

    def give(self, packed: bytes) -> None:
        """Send what was put into ``under`` last."""
        self._last = len(packed)
        channel.send(self.conn, packed)

    def answer(self) -> tuple[Job, tuple[Any, ...]]:
        """The first job's answer, and the job."""
        said = channel.receive(self.conn)
        self._quick = said[0] == "done" and said[2] < QUICK and self._last <= self.room
        return self.under.popleft(), said

    def cause(self) -> str:
        """Why it ended, in words: the signal, or the last line that it wrote."""
        status = self.process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            return f"{name}, as when memory runs out" if name == "SIGKILL" else name
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"status {status}" + (f", {lines[-1]}" if lines else "")

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        if self.life >= 0:
            os.close(self.life)
        self.life = -1

    def release(self) -> None:
        """Wait for its end and close what was open for it."""
        self.process.wait()
        self.conn.close()
        self.errors.close()


def _widened(conn: Connection) -> int:
    """Ask for ``BUFFER`` bytes to this side's messages; bytes that surely lie there unread without making the sender wait."""
    with socket.socket(fileno=os.dup(conn.fileno())) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        return s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4
