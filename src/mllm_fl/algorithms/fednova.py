"""FedNova.

Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, 2020,
arXiv:2007.07481, eq. (7) and section 4.

    d_k = (w^t - w_k) / ||a_k||_1,   tau_eff = sum_k p_k ||a_k||_1,   w^{t+1} = w^t - tau_eff sum_k p_k d_k
    plain SGD: ||a_k||_1 = steps;   momentum rho: [steps - rho (1 - rho^steps) / (1 - rho)] / (1 - rho)

BatchNorm's statistics are averaged as in FedAvg. Where all clients take equally many steps, as under the ``creff`` partition, the method *is* FedAvg (up to the
rounding of the sums); use the ``dirichlet`` partition to see it act. Weight decay is not part of a_k (it is in the local gradient).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Task, Update, empty_leaf
from mllm_fl.trees import Tree, weighted_mean


def normaliser(steps: int, momentum: float) -> float:
    """||a_k||_1 of ``steps`` local steps of SGD with this momentum, FedNova section 4."""
    if momentum == 0:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class FedNova(Algorithm):
    """``normalise``: divide each client's change by its number of steps; off is FedAvg."""

    normalise: bool = True
    neutral: ClassVar[dict[str, Any]] = {"normalise": False}
    uploads: ClassVar[str] = "||a_k||_1, one number"

    def upload_bytes(self, task: Task, present: int) -> int:
        return 8

    def upload_form(self, task: Task) -> dict[str, Tree]:
        return {"": {"a": empty_leaf(1, dtype=torch.float64)}}

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, mine = super().finish(task, local, msg, mine)
        a = torch.tensor([normaliser(local.steps, local.momentum)], dtype=torch.float64)
        return update._replace(extra={"a": a}), mine

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        total = steps = 0.0
        pace = {k: torch.zeros(s.w[k].shape, dtype=torch.float64) for k in task.trainable}  # sum_k n_k (w_k - w) / a_k

        def seen() -> Iterator[tuple[float, Tree]]:
            nonlocal total, steps
            for u in updates:
                a = float(u.extra["a"])
                total, steps = total + u.weight, steps + u.weight * a
                for k in pace:
                    pace[k] += (u.w[k].double() - s.w[k].double()) * (u.weight / a)
                yield u.weight, u.w

        mean = weighted_mean(seen())
        if not self.normalise:
            return replace(s, w=mean)
        tau_eff = steps / total
        moved = {k: (s.w[k].double() + tau_eff * v / total).to(s.w[k].dtype) for k, v in pace.items()}  # eq. (7)
        return replace(s, w=mean | moved)
