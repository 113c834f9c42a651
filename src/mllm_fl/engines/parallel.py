"""The parallel engine: persistent worker processes of one thread each. The same bits as the serial engine, whatever their number.

A client is trained in one thread from named streams, so it makes no difference which worker runs it, when, or after whose death; updates
are handed on in client order, so sums are the same too. The largest client is begun first and each worker takes the next when it is free.
Workers are started as programs of their own: they do not run the caller's script again, so that a script needs no ``__main__`` guard; a
method that they are to run has to be importable (a module, not the script itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, client_failed, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.cores import workers_allowed
from mllm_fl.engines.evaluate import BATCH
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.pool import Pool
from mllm_fl.engines.process import Failed, Job
from mllm_fl.engines.worker import Setup
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree, nbytes

AHEAD = 256 << 20
"""Bytes of updates that may lie here because a client before them has not answered yet."""


class ParallelEngine:
    """See :class:`mllm_fl.engines.base.Engine`. Entering it starts the workers without waiting for them."""

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        algorithm: Algorithm,
        local: LocalConfig,
        batch_norm: str = "average",
        on_event: OnEvent = ignored,
        pool: Pool | None = None,
    ) -> None:
        self.task, self.on_event = task, on_event
        self._setup = Setup(task, algorithm, local, batch_norm)
        self._given = pool is not None
        self._sent: tuple[str, int] | None = None
        workers = workers_allowed(config.workers)
        if pool is None and config.workers is not None and workers < config.workers:
            on_event("fewer workers", asked=config.workers, started=workers)
        self.pool = pool or Pool(workers)

    def __enter__(self) -> ParallelEngine:
        for images in (self.task.unlabelled, self.task.labelled):
            if images is not None:
                self.pool.share(images)
        self._mine()
        self.pool.start()
        return self

    def _mine(self) -> tuple[tuple[str, int], ...]:
        """What this engine's jobs have in common, sent anew if another engine has used the pool since."""
        if self._sent is None or self.pool.current("setup") != self._sent:
            try:
                self._sent = self.pool.common("setup", self._setup)
            except Exception as e:  # a class inside a function, a lambda
                raise _unsendable(f"{type(e).__name__}: {e}") from e
        return (self._sent,)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if not self._given:
            self.pool.close()

    def prove(self) -> None:
        """Wait until a worker has taken the setup.

        Raises:
            UserError: no worker can start, or what the setup names cannot be imported there.
        """
        for _ in self._ordered(iter([Job("hello", (), self._mine(), 0, "federate.engine", {})]), 1):
            pass

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        keep = (*self._mine(), self.pool.common("broadcast", msg))
        jobs = (self._job("train", shard, (shard, memory.get(shard.client, {})), keep) for shard in shards)
        ahead = max(4 * self.pool.workers, AHEAD // max(1, nbytes(msg.w)))
        for shard, ((update, remembered), seconds) in zip(shards, self._ordered(jobs, ahead), strict=True):
            yield Reply(shard.client, update, remembered, seconds)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        self.pool.share(images)
        keep = (*self._mine(), self.pool.common("model", w))
        step = BATCH * max(1, min(10, len(images) // (BATCH * 4 * self.pool.workers)))
        starts = range(0, len(images), step)
        jobs = (
            Job("evaluate", (images, a, min(a + step, len(images))), keep, step, "evaluation", {"client": None})
            for a in starts
        )
        total = Evaluation.none(len(self.task.class_names))
        for found, _ in self._ordered(jobs, len(starts)):
            total = total + found
        return total

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        keep = (*self._mine(), self.pool.common("broadcast", msg))
        jobs = (self._job("survey", shard, (shard,), keep) for shard in shards)
        for shard, (answer, _) in zip(shards, self._ordered(jobs, 64 * self.pool.workers), strict=True):
            yield shard.client, answer

    def _job(self, kind: str, shard: Shard, args: tuple[Any, ...], keep: tuple[tuple[str, int], ...]) -> Job:
        self.pool.share(shard.images)
        fields = {"client": shard.client, "round": shard.round}
        return Job(kind, args, keep, len(shard), f"client {shard.client}, round {shard.round}", fields)

    def _ordered(self, jobs: Iterator[Job], ahead: int) -> Iterator[tuple[Any, float]]:
        """Answers in the order of ``jobs``, of which at most ``ahead`` are under way or wait to be taken."""
        waiting: list[int] = []
        try:
            while True:
                while len(waiting) < ahead and (job := next(jobs, None)) is not None:
                    waiting.append(self.pool.submit(job))
                if not waiting:
                    return
                if self.pool.answered() > ahead // 2:
                    self.pool.hurry(waiting[0])
                found = self.pool.answer(waiting.pop(0))
                self._tell()
                yield found
        except Failed as e:
            if e.kind == "broken":
                raise _unsendable(e.said) from e
            if e.kind == "refused":
                place, _, rest = e.said.partition(": ")
                raise UserError(place, rest) from e
            raise client_failed(e.job.who, e.said, e.traceback, e.job.fields, self.on_event) from e
        finally:
            self._tell()
            self.pool.forget()

    def _tell(self) -> None:
        for kind, fields in self.pool.told():
            self.on_event(kind, **fields)


def _unsendable(why: str) -> UserError:
    return UserError(
        "federate.engine",
        f"the method or the task cannot be sent to a worker process ({why})",
        'define it in a module of its own, or set federate.engine.name = "serial"',
    )
