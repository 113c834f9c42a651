"""Worker processes, and who of them does what: the largest job first, the next to whoever is free, once more elsewhere after a death."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mllm_fl.data.images import ImageSet
from mllm_fl.engines import channel
from mllm_fl.engines.process import Failed, Job, Process
from mllm_fl.errors import UserError

_FIRST = 1 << 62  # the size of a job that somebody waits for


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
        self._processes: list[Process | None] = [None] * workers
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

    def _next(self, i: int, wait: bool) -> Job | None:
        """The job that worker ``i`` is to do: the largest that did not kill it before. None: there is none, for good if ``wait``."""
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
                if job is not None or not wait:
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
                try:
                    self._fill(i, process)
                    if not process.under:
                        return
                    self._told(i, *process.answer())
                except (EOFError, OSError):
                    process.end()
                    cause = process.cause()
                    process.release()
                    self._died(i, list(process.under), cause)
                    process = None
        except BaseException as e:  # a job that cannot be packed, for example
            self._fail(e)
        finally:
            if process is not None:
                process.end()
                process.release()

    def _started(self, i: int) -> Process | None:
        """A process that is ready; None if it ended before."""
        with self._changed:
            if self._closing:
                return None
            process = self._processes[i] = Process()
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

    def _fill(self, i: int, process: Process) -> None:
        """Give the worker what it should have; without a job, wait for one. It has none afterwards if there will be none."""
        while len(process.under) < process.depth:
            job = self._next(i, wait=not process.under)
            if job is None or not self._given(i, process, job):
                return

    def _given(self, i: int, process: Process, job: Job) -> bool:
        """Send a job and what it needs; False where it cannot be sent yet, and waits again."""
        missing = [(kind, number, *self._common[kind]) for kind, number in job.keep if process.kept.get(kind) != number]
        for kind, number, current, _, _ in missing:
            if current != number:  # of a batch that nobody waits for any more
                self._told(i, job, ("broken", f"its {kind} has been replaced", ""))
                return True
        packed, used = (b"", set[int]()) if missing and process.under else self._pack((job.kind, *job.args))
        if process.under and (missing or used - process.has or not process.takes(len(packed))):
            self._again([job])
            return False
        process.under.append(job)
        for kind, number, _, common, its in missing:
            self._lend(process, its)
            channel.send(process.conn, common)
            process.kept[kind] = number
        self._lend(process, used)
        process.give(packed)
        return True

    def _lend(self, process: Process, used: set[int]) -> None:
        for number in sorted(used - process.has):
            self.shelf.send(process.conn, number, process.process.pid)
            process.has.add(number)

    def _told(self, i: int, job: Job, said: tuple[Any, ...]) -> None:
        if said[0] == "done":
            self.busy[i] += said[2]
        with self._changed:
            if job.batch == self._batch:
                self._answers[job.number] = said[1:] if said[0] == "done" else Failed(job, *said)
            self._changed.notify_all()

    def _again(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                if job.batch == self._batch:
                    self._queue(job)

    def _died(self, i: int, jobs: Sequence[Job], cause: str) -> None:
        """A worker died over the first of ``jobs``; it had not begun the others."""
        with self._changed:
            self._again(jobs[1:])
            if self._closing or not jobs or jobs[0].batch != self._batch:
                return
            job = jobs[0]
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
