"""Balanced softmax.

Ren, Yu, Sheng, Ma, Zhao, Yi, Li: Balanced Meta-Softmax for Long-Tailed Visual Recognition, 2020, arXiv:2007.10740, eq. (4);
its meta-sampler is left out.

    client k minimises -log( n_y^power e^{z_y} / sum_c n_c^power e^{z_c} ),   else FedAvg

The paper is centralised; n_c are the federation's counts as far as known (``counts.py``), or the client's own. A class that nobody is known to have drops out of the sum: with
``prior = "local"`` that is every class the client lacks, and their rows of the classifier get no gradient. ``power`` 1 is the paper's, 0 is FedAvg.
log n_c and log n_c / N differ by a constant: at power 1 and with the global prior this *is* logit adjustment at tau 1, up to classes that nobody is known to have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm_fl.algorithms.base import Broadcast, Task, in_ranges
from mllm_fl.algorithms.counts import SharesCounts
from mllm_fl.losses import balanced_softmax
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class BalancedSoftmax(SharesCounts):
    """``power``: exponent of the counts."""

    power: float = 1.0
    neutral: ClassVar[dict[str, Any]] = {"power": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        in_ranges(self, power="[0, 10]")

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        return balanced_softmax(
            task.forward(w, x)[1], y, mine["counts"] ** self.power
        )  # power 0: 0^0 = 1, all classes alike
