"""FedProx.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, 2020,
arXiv:1812.06127, Algorithm 2 and eq. (2).

    client k minimises  F_k(w) + (mu / 2) ||w - w^t||^2,   else FedAvg

What we change: clients are drawn uniformly and weighted by n_k as everywhere here (the paper draws them by n_k and weighs them alike). The norm is squared and
runs over trainable parameters only, never over BatchNorm statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Task, in_ranges
from mllm_fl.losses import proximal
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class FedProx(Algorithm):
    """``mu``: strength of the proximal term; 0.01 as in CReFF's code, the paper's predecessor."""

    mu: float = 0.01
    neutral: ClassVar[dict[str, Any]] = {"mu": 0.0}

    def __post_init__(self) -> None:
        in_ranges(self, mu="[0, inf)")

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        loss = super().objective(task, w, msg, mine, x, y)
        return loss + proximal({k: w[k] for k in task.trainable}, msg.w, self.mu)  # eq. (2)
