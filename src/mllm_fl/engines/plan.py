"""Which images the clients of one tensor program take in which step: every client's own order, steps of equal batch size side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Shard
from mllm_fl.data.augment import draws
from mllm_fl.engines.device import DeviceShard
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.program import Program
from mllm_fl.seeds import stream


def all_epochs(program: Program, shards: Sequence[DeviceShard], local: LocalConfig) -> None:
    """All local epochs: in each the full batches side by side, then the partial ones, together where they are of one size."""
    b, starts = local.batch_size, torch.tensor([0, *(len(s) for s in shards)]).cumsum(0).tolist()
    orders = [_order(s, start, local, program.padding) for s, start in zip(shards, starts, strict=False)]
    for _ in range(local.epochs):
        plans = [next(order) for order in orders]
        sizes = [plan.shape[1] for plan in plans]
        for first in range(0, max(sizes), b):
            rows = [k for k, n in enumerate(sizes) if n >= first + b]
            if rows:
                program.run(rows, torch.stack([plans[k][:, first : first + b] for k in rows], 1))
        for rest in sorted({n % b for n in sizes} - {0}):
            rows = [k for k, n in enumerate(sizes) if n % b == rest]
            program.run(rows, torch.stack([plans[k][:, -rest:] for k in rows], 1))


def _order(shard: Shard, start: int, local: LocalConfig, padding: int) -> Iterator[Tensor]:
    """A client's epochs, int64 (4, n_k): positions from ``start`` on in the order of its steps, and each image's top, left and turned."""
    shuffle, drawn = (stream(shard.seed, purpose, shard.round, shard.client) for purpose in ("shuffle", "augment"))
    while True:
        order = torch.randperm(len(shard), generator=shuffle)
        plan = torch.full((4, len(order)), padding)
        plan[0], plan[3] = order + start, 0
        for part in plan.split(local.batch_size, 1) if local.augment != "none" else ():
            flip = local.augment == "crop-flip"
            for row, v in enumerate(draws(part.shape[1], drawn, padding=padding, flip=flip, mode=local.aug_mode), 1):
                part[row] = v
        yield plan
