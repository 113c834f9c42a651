"""FedAvg + tau-norm.

Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis: Decoupling Representation and Classifier for Long-Tailed Recognition, 2020,
arXiv:1910.09217, eq. (3), on the classifier that FedAvg ends with.

    w^_c = w_c / ||w_c||^tau

Only what is deployed changes; what is broadcast is FedAvg's, so the method also runs on a finished FedAvg run (``--from``). Their evaluation drops the bias, ours does by default. The
paper that we follow does not say its tau; 1 is the value with a name (all rows of unit length). Choosing tau on test data is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mllm_fl.algorithms.base import Algorithm, Server, Task, in_ranges
from mllm_fl.statistics import tau_normalised
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class TauNorm(Algorithm):
    """``tau``: exponent, 0 leaves the rows alone. ``bias``: keep the classifier's bias."""

    tau: float = 1.0
    bias: bool = False
    neutral: ClassVar[dict[str, Any]] = {"tau": 0.0, "bias": True}

    def __post_init__(self) -> None:
        in_ranges(self, tau="[0, 10]")

    def deploy(self, task: Task, s: Server) -> Tree:
        weight, bias = task.head
        head = {weight: tau_normalised(s.w[weight], self.tau)}
        return s.w | head | ({} if self.bias else {bias: torch.zeros_like(s.w[bias])})
