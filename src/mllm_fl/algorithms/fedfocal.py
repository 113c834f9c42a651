"""Fed-Focal loss.

Sarkar, Narang, Rai: Fed-Focal Loss for Imbalanced Data Classification in Federated Learning, 2020, arXiv:2011.06283.

    client k minimises  -alpha (1 - p_y)^gamma log p_y,   else FedAvg

The original also samples the better clients on the server; the line of CReFF and CLIP2FL does not, nor do we. gamma = 2; alpha = 1 as in the
ratio loss's code (the modulating factor alone). A scalar alpha of 0.25, found in other code, is a learning rate four times smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Task, in_ranges
from mllm_fl.losses import focal
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class FedFocal(Algorithm):
    """``gamma``: focusing exponent, 2 in the paper. ``alpha``: scalar factor."""

    gamma: float = 2.0
    alpha: float = 1.0
    neutral: ClassVar[dict[str, Any]] = {"gamma": 0.0, "alpha": 1.0}

    def __post_init__(self) -> None:
        in_ranges(self, gamma="[0, inf)", alpha="(0, inf)")

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        return focal(task.forward(w, x)[1], y, self.gamma, self.alpha)
