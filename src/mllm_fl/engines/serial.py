"""The serial engine: one client after another in one process. The reference that reads like the paper."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task, Update
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.trees import Tree


class Reply(NamedTuple):
    """One client's answer: its update, what it now remembers, and the seconds it took."""

    client: int
    update: Update
    memory: Tree
    seconds: float


def run_clients(
    task: Task,
    algorithm: Algorithm,
    msg: Broadcast,
    shards: Sequence[Shard],
    memory: Mapping[int, Tree],
    config: LocalConfig,
    batch_norm: str = "average",
) -> Iterator[Reply]:
    """Train the online clients and yield their replies in the order of ``shards``, which is client order."""
    for shard in shards:
        start = time.perf_counter()
        update, remembered = train_client(task, algorithm, msg, memory.get(shard.client, {}), shard, config, batch_norm)
        yield Reply(shard.client, update, remembered, time.perf_counter() - start)
