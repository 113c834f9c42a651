"""Worker processes, and who of them does what: the largest job first, the next to whoever is free, once more elsewhere after a death."""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from mllm_fl.data.images import ImageSet
from mllm_fl.engines import channel
from mllm_fl.errors import UserError

_START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from mllm_fl.engines.worker import main; main({fd}, {life})"
)
_FIRST = 1 << 62  # the size of a job that somebody waits for
ENVIRONMENT = {  # freed memory is kept for the next step instead of being given back and faulted in again
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@dataclass
class Job:
    """One client to train or to ask, or some images to test.

    ``keep``: (kind, number) of each thing that it has in common with others, see :meth:`Pool.common`. ``size``: larger ones are
    begun first. ``who``: the words for it; ``fields``: those of an event about it.
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


class _Process:
    """A worker as its parent sees it."""

    def __init__(self) -> None:
        ours, theirs = Pipe(duplex=True)
        read, self.life = os.pipe()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.conn: Connection = ours
        self.has: set[int] = set()
        self.kept: dict[str, int] = {}
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
        self.process.kill()
        if self.life >= 0:
            os.close(self.life)
        self.life = -1

    def release(self) -> None:
        self.process.wait()
        self.conn.close()
        self.errors.close()


class Pool:
    """``workers`` processes with a thread here for each; jobs go in, answers come out by number, in any order.

    Nothing starts before :meth:`start`. Only one thread may call it.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.shelf = channel.Shelf()
        self.busy = [0.0] * workers  # seconds that each worker has computed
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._waiting: dict[int, Job] = {}
        self._order: list[tuple[int, int]] = []  # a heap of (-size, number); those that no longer wait are passed over
        self._answers: dict[int, Any] = {}
        self._common: dict[str, tuple[int, bytes, set[int]]] = {}
        self._processes: list[_Process | None] = [None] * workers
        self._threads: list[threading.Thread] = []
        self._broken: BaseException | None = None
        self._closing = False
        self._batch = self._numbers = 0

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        for i in range(len(self._threads), self.workers):
            thread = threading.Thread(target=self._serve, args=(i,), daemon=True, name=f"mllm-fl worker {i}")
            self._threads.append(thread)
            thread.start()

    def common(self, kind: str, value: Any) -> tuple[str, int]:
        """What the jobs to come have in common, packed once and sent once to each worker; replaces the last of its kind."""
        self._numbers += 1
        self._common[kind] = (self._numbers, *self._pack(("keep", kind, value)))
        return kind, self._numbers

    def current(self, kind: str) -> tuple[str, int] | None:
        """What :meth:`common` returned last for this kind; another engine may have called it since."""
        return (kind, self._common[kind][0]) if kind in self._common else None

    def pids(self) -> list[int]:
        """Process numbers of the workers that have been started."""
        return [p.process.pid for p in self._processes if p is not None]

    def share(self, images: ImageSet) -> None:
        """See :meth:`mllm_fl.engines.channel.Shelf.put`."""
        self.shelf.put(images)

    def submit(self, job: Job) -> int:
        """Queue a job; its number."""
        with self._changed:
            self._numbers += 1
            job.number, job.batch = self._numbers, self._batch
            self._queue(job)
        return job.number

    def hurry(self, number: int) -> None:
        """Begin this job before larger ones: somebody waits for it."""
        with self._changed:
            if number in self._waiting:
                heapq.heappush(self._order, (-_FIRST, number))

    def answered(self) -> int:
        """How many answers nobody has taken yet."""
        return len(self._answers)

    def answer(self, number: int) -> tuple[Any, float]:
        """The answer to a job and the seconds it took, as soon as it is there.

        Raises:
            Failed: it raised in its worker.
            UserError: workers died twice over it, or cannot start.
        """
        with self._changed:
            while number not in self._answers and self._broken is None:
                self._changed.wait()
            if number not in self._answers:
                assert self._broken is not None
                raise self._broken
            found = self._answers.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Nobody wants what was submitted so far: jobs that wait are dropped, answers to running ones are thrown away."""
        with self._changed:
            self._batch += 1
            self._waiting.clear()
            self._order.clear()
            self._answers.clear()

    def told(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events since the last call."""
        while self.events:
            yield self.events.pop(0)

    def close(self) -> None:
        """End the processes at once."""
        with self._changed:
            self._closing = True
            for process in self._processes:
                if process is not None:
                    process.end()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self.shelf.close()

    def _pack(self, message: tuple[Any, ...]) -> tuple[bytes, set[int]]:
        return channel.pack(message, self.shelf.numbers)

    def _next(self, i: int) -> Job | None:
        """The job that worker ``i`` is to do: the largest that did not kill it before; waits for one. None: no more."""
        with self._changed:
            while not self._closing:
                left: list[tuple[int, int]] = []
                job = None
                while self._order and job is None:
                    entry = heapq.heappop(self._order)
                    if entry[1] not in self._waiting:
                        continue
                    if i in self._waiting[entry[1]].died and self.workers > 1:
                        left.append(entry)
                    else:
                        job = self._waiting.pop(entry[1])
                for entry in left:
                    heapq.heappush(self._order, entry)
                if job is not None:
                    return job
                self._changed.wait()
        return None

    def _queue(self, job: Job) -> None:
        self._waiting[job.number] = job
        heapq.heappush(self._order, (-job.size, job.number))
        self._changed.notify_all()

    def _serve(self, i: int) -> None:
        """The thread of worker ``i``."""
        failed_starts = 0
        process = None
        try:
            while True:
                if process is None:
                    process = self._started(i)
                    if process is None:
                        failed_starts += 1
                        if self._closing or failed_starts == 2:
                            return
                        continue
                failed_starts = 0
                job = self._next(i)
                if job is None:
                    return
                try:
                    self._told(i, job, self._asked(process, job))
                except (EOFError, OSError):
                    process.end()
                    cause = process.cause()
                    process.release()
                    process = None
                    self._died(i, job, cause)
        except BaseException as e:  # a job that cannot be packed, for example
            self._fail(e)
        finally:
            if process is not None:
                process.end()
                process.release()

    def _started(self, i: int) -> _Process | None:
        """A process that is ready; None if it ended before."""
        with self._changed:
            if self._closing:
                return None
            process = self._processes[i] = _Process()
        try:
            channel.receive(process.conn)  # "ready"
        except (EOFError, OSError):
            cause = "closed"
            if not self._closing:
                cause = process.cause()
                self._fail(UserError("federate.engine", f"a worker process cannot start: {cause}"), twice=True)
            process.end()
            process.release()
            return None
        return process

    def _hand(self, process: _Process, packed: bytes, used: set[int]) -> None:
        for number in sorted(used - process.has):
            self.shelf.send(process.conn, number, process.process.pid)
            process.has.add(number)
        channel.send(process.conn, packed)

    def _asked(self, process: _Process, job: Job) -> tuple[Any, ...]:
        for kind, number in job.keep:
            if process.kept.get(kind) != number:
                current, packed, used = self._common[kind]
                if current != number:  # of a batch that nobody waits for any more
                    return "broken", f"its {kind} has been replaced", ""
                self._hand(process, packed, used)
                process.kept[kind] = number
        self._hand(process, *self._pack((job.kind, *job.args)))
        said: tuple[Any, ...] = channel.receive(process.conn)
        return said

    def _told(self, i: int, job: Job, said: tuple[Any, ...]) -> None:
        if said[0] == "done":
            self.busy[i] += said[2]
        with self._changed:
            if job.batch == self._batch:
                self._answers[job.number] = said[1:] if said[0] == "done" else Failed(job, *said)
            self._changed.notify_all()

    def _died(self, i: int, job: Job, cause: str) -> None:
        with self._changed:
            if self._closing or job.batch != self._batch:
                return
            job.died.append(i)
            self.events.append(("worker died", {**job.fields, "cause": cause}))
            if len(job.died) == 1:
                job.size = _FIRST
                self._queue(job)
            else:
                way_out = "the same command resumes; give it more memory or fewer workers (federate.engine.workers)"
                self._answers[job.number] = UserError(job.who, f"two workers died over it: {cause}", way_out)
            self._changed.notify_all()

    def _fail(self, e: BaseException, twice: bool = False) -> None:
        with self._changed:
            if not twice or any(kind == "worker cannot start" for kind, _ in self.events):
                self._broken = self._broken or e
            elif not self._closing:
                self.events.append(("worker cannot start", {"cause": str(e)}))
            self._changed.notify_all()
