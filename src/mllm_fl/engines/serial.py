"""The serial engine: one client after another in one process. The reference that reads like the paper."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, client_failed, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
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
        self.on_event, self._threads = on_event, 0

    def __enter__(self) -> SerialEngine:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in the same order on every machine
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        torch.set_num_threads(self._threads)

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        for shard in shards:
            start = time.perf_counter()
            mine = memory.get(shard.client, {})
            with self._named(shard):
                update, remembered = train_client(
                    self.task, self.algorithm, msg, mine, shard, self.local, self.batch_norm
                )
            yield Reply(shard.client, update, remembered, time.perf_counter() - start)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        return evaluate(self.task, w, images)

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        for shard in shards:
            with self._named(shard):
                answer = self.algorithm.survey(self.task, msg, shard)
            yield shard.client, answer

    @contextlib.contextmanager
    def _named(self, shard: Shard) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            who, fields = f"client {shard.client}, round {shard.round}", {"client": shard.client, "round": shard.round}
            said = f"{type(e).__name__}: {e}"
            raise client_failed(who, said, traceback.format_exc(), fields, self.on_event) from e
