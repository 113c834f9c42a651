"""The serial engine: one client after another in one process. The reference that reads like the paper."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree


class SerialEngine:
    """See :class:`mllm_fl.engines.base.Engine`."""

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        algorithm: Algorithm,
        local: LocalConfig,
        batch_norm: str = "average",
        on_event: OnEvent = ignored,
    ) -> None:
        self.task, self.algorithm, self.local, self.batch_norm = task, algorithm, local, batch_norm

    def __enter__(self) -> SerialEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        for shard in shards:
            start = time.perf_counter()
            mine = memory.get(shard.client, {})
            update, remembered = train_client(self.task, self.algorithm, msg, mine, shard, self.local, self.batch_norm)
            yield Reply(shard.client, update, remembered, time.perf_counter() - start)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        return evaluate(self.task, w, images)

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        for shard in shards:
            yield shard.client, self.algorithm.survey(self.task, msg, shard)
