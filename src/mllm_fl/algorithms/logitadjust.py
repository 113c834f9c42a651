"""Logit adjustment.

Menon, Jayasumana, Rawat, Jain, Veit, Kumar: Long-tail learning via logit adjustment, 2021, arXiv:2007.07314, eq. (10);
with the client's own prior it is close to the calibration of Zhang et al. 2022 (arXiv:2209.00189).

    client k minimises CE(logits + tau log prior, y),   prior = counts of the federation (global) or of the client (local)

The paper is centralised. Ours: the global prior is the sum of the label counts that clients seen so far have sent (``counts.py``), so its first round
knows only the client's own. tau = 1 as in the paper; with the global prior that is balanced softmax at power 1, up to classes that nobody is known to have. A class with prior zero is shut off by log 1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_fl.algorithms.base import Broadcast, Task, in_ranges
from mllm_fl.algorithms.counts import SharesCounts
from mllm_fl.losses import logit_adjusted
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class LogitAdjust(SharesCounts):
    """``tau``: strength of the adjustment, 1 in the paper; 0 is FedAvg."""

    tau: float = 1.0
    neutral: ClassVar[dict[str, Any]] = {"tau": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        in_ranges(self, tau="[0, 10]")

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        return logit_adjusted(task.forward(w, x)[1], y, self.shares(mine), self.tau)
