"""The engine that begins serially and moves to worker processes once that has cost as much as starting them. The same bits either way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.parallel import ParallelEngine
from mllm_fl.engines.serial import SerialEngine
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree

PATIENCE = 2.0
"""Seconds of serial work after which workers are started; about what starting them costs."""


class AutoEngine:
    """See :class:`mllm_fl.engines.base.Engine`. A method that no worker can import stays serial, and an event says so."""

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        algorithm: Algorithm,
        local: LocalConfig,
        batch_norm: str = "average",
        on_event: OnEvent = ignored,
    ) -> None:
        args = (config, task, algorithm, local, batch_norm, on_event)
        self.serial, self._args, self.on_event = SerialEngine(*args), args, on_event
        self.parallel: ParallelEngine | None = None
        self.spent, self.stays = 0.0, False

    def __enter__(self) -> AutoEngine:
        self.serial.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self.parallel is not None:
                self.parallel.__exit__(kind, e, tb)
        finally:
            self.serial.__exit__(kind, e, tb)

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        done = 0
        if self.parallel is None:
            for reply in self.serial.clients(msg, shards, memory):
                self.spent += reply.seconds
                done += 1
                yield reply
                if done < len(shards) and self._moved():
                    break
        if self.parallel is not None and done < len(shards):
            yield from self.parallel.clients(msg, shards[done:], memory)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        start = time.perf_counter()
        found = (self.parallel or self.serial).evaluate(w, images)
        self.spent += time.perf_counter() - start
        return found

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        return (self.parallel or self.serial).survey(msg, shards)

    def _moved(self) -> bool:
        """Whether there are workers now."""
        if self.spent < PATIENCE or self.stays:
            return False
        engine = ParallelEngine(*self._args)
        try:
            engine.__enter__()
            engine.prove()
        except UserError as e:
            engine.__exit__(None, None, None)
            self.stays = True
            self.on_event("stays serial", cause=str(e))
            return False
        self.parallel = engine
        return True
