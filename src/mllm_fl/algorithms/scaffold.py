"""SCAFFOLD.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020,
arXiv:1910.06378, Algorithm 1, option II.

    client:  w_k <- w_k - lr (g_k(w_k) - s (c_k - c)),   c_k+ = s (c_k - c) + (w^t - w_k) / (K_k lr),   s = ``control``, 1 in the paper
    server:  w <- w + sum_k p_k (w_k - w),   c <- c + (|S| / N) mean_k (c_k+ - c_k)

What we change: the model's mean is weighted by n_k as everywhere here (the paper's is uniform), BatchNorm's statistics are averaged. With local momentum the
variate is no longer a mean gradient; the method then needs plain SGD and says so. The memory c_k starts at zero. Any s keeps c_k+ the client's mean gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Task, Update, empty_leaf, in_ranges
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree, weighted_mean


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """``control``: strength of the correction c - c_k; 1 is the paper's, 0 is FedAvg."""

    control: float = 1.0
    neutral: ClassVar[dict[str, Any]] = {"control": 0.0}
    uploads: ClassVar[str] = "change of the control variate, as large as the parameters"
    downloads: ClassVar[str] = "the server's control variate, as large as the parameters"

    def __post_init__(self) -> None:
        in_ranges(self, control="[0, 1]")

    def upload_bytes(self, task: Task, present: int) -> int:
        return sum(p.numel() * p.element_size() for p in task.net.parameters())

    def download_bytes(self, task: Task) -> int:
        return self.upload_bytes(task, 0)

    def upload_form(self, task: Task) -> dict[str, Tree]:
        return {"": {k: empty_leaf(*p.shape, dtype=p.dtype) for k, p in task.net.named_parameters()}}

    def init(self, task: Task, w: Tree) -> Server:
        return Server(w=w, extra={k: torch.zeros_like(w[k]) for k in task.trainable})  # c

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, s.extra)

    def correct(self, grads: Tree, msg: Broadcast, mine: Tree) -> Tree:
        return {k: g + self.control * (msg.extra[k] - mine.get(k, 0)) for k, g in grads.items()}

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        if local.momentum != 0:
            raise UserError("federate.local.momentum", "SCAFFOLD's variate is defined for plain SGD", "set it to 0")
        update, _ = super().finish(task, local, msg, mine)
        old = {k: mine.get(k, torch.zeros_like(msg.extra[k])) for k in task.trainable}
        reach = local.steps * local.lr
        new = {k: self.control * (old[k] - msg.extra[k]) + (msg.w[k] - local.w[k]) / reach for k in old}  # option II
        return update._replace(extra={k: new[k] - old[k] for k in old}), new

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        moved = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in s.extra.items()}

        def seen() -> Iterator[tuple[float, Tree]]:
            for u in updates:
                for k in moved:
                    moved[k] += u.extra[k]
                yield u.weight, u.w

        mean = weighted_mean(seen())  # |S| / N times the mean over S is the sum over N
        c = {k: (v.double() + moved[k] / len(task.population)).to(v.dtype) for k, v in s.extra.items()}
        return replace(s, w=mean, extra=c)
