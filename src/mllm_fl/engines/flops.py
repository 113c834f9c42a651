"""Floating-point operations, counted once on one step and multiplied: what a client, an evaluation and an alignment compute.

PyTorch's counter sees matrix products, convolutions and attention (a multiply-add is two operations) and nothing else: element-wise work,
BatchNorm and optimisers are left out. Nothing that a run depends on is drawn or changed: hooks are pure, streams are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_fl.algorithms.base import Algorithm, Server, Shard, Task, Update
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.trees import Tree

T = TypeVar("T")


def counted(call: Callable[[], T]) -> tuple[T, int]:
    """What ``call`` returns, and the operations of its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, int(counter.get_total_flops())


def of_client(
    task: Task, algorithm: Algorithm, state: Server, shard: Shard, config: LocalConfig, batch_norm: str = "average"
) -> tuple[float, float, Update]:
    """Operations of one image in one local step, of one image in what a visit does beside its steps, and an update to go on with.

    The step is the difference between two epochs and one on a single batch; ``begin`` is counted on all of the client's images.
    """
    msg = algorithm.broadcast(state)
    n = min(len(shard), config.batch_size)
    few = replace(
        shard, images=shard.images.subset(range(n)), teacher=None if shard.teacher is None else shard.teacher[:n]
    )

    def visit(epochs: int) -> tuple[Update, int]:
        found, flop = counted(
            lambda: train_client(task, algorithm, msg, {}, few, replace(config, epochs=epochs), batch_norm)
        )
        return found[0], flop

    update, once = visit(1)
    step = visit(2)[1] - once
    begin = counted(lambda: algorithm.begin(task, msg, {}, shard))[1]
    return step / n, begin / len(shard), update


def of_server(task: Task, algorithm: Algorithm, state: Server, update: Update, online: Sequence[int]) -> int:
    """Operations of one aggregation, on copies of one update in the place of ``online`` clients' (plain averaging counts as none)."""
    if type(algorithm).server is Algorithm.server:
        return 0
    copies = [update._replace(client=k) for k in online]
    return counted(lambda: algorithm.server(task, state, iter(copies)))[1]


def of_image(task: Task, w: Tree, images: ImageSet) -> float:
    """Operations of one forward pass of one image."""
    n = min(len(images), 8)
    with torch.no_grad():
        return counted(lambda: task.forward(dict(w), images.normalised(range(n)), train=False))[1] / n
