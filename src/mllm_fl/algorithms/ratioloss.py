"""Ratio loss.

Wang, Xu, Wang, Zhu: Addressing Class Imbalance in Federated Learning, 2021, arXiv:2008.06217, section 3.

    the server trains, from the new global model, one copy a class on that class's images of a balanced labelled set;
    how the copies' classifiers moved tells how rare each class has been (``statistics.ratio_weights``, its monitor);
    next round every client minimises  -(alpha + beta R_y) log p_y,  batch mean, not renormalised

In the first round all weights are 1. What we change: the copies start from w^{t+1}, on which the weights will be used; theirs start from w^t, before the clients are averaged. The monitor trains as long
as a client does: ``steps`` steps at ``lr``, one mini-batch being all of a class's images (64 there, 32 here, from the training images that no client holds; of a class that the long
tail keeps whole, from the clients' own). Theirs trains clients and monitor alike with lr 1e-3, momentum 0.9, weight decay 5e-4;
in this protocol both use plain SGD 0.1. R can be large: ``normalise`` divides the weights by their mean (a variant, off).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Server, Task, Update, in_ranges
from mllm_fl.descent import descend
from mllm_fl.errors import UserError
from mllm_fl.losses import cross_entropy, weighted_cross_entropy
from mllm_fl.statistics import ratio_weights
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class RatioLoss(Algorithm):
    """``alpha`` + ``beta`` R_c weighs class c (1 and 0.1 in the paper). ``steps``, ``lr``: of the monitor's copies."""

    alpha: float = 1.0
    beta: float = 0.1
    steps: int = 10
    lr: float = 0.1
    normalise: bool = False
    neutral: ClassVar[dict[str, Any]] = {"alpha": 1.0, "beta": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("labelled",)
    downloads: ClassVar[str] = "class weights, one number a class"

    def __post_init__(self) -> None:
        in_ranges(self, alpha="(0, inf)", beta="[0, inf)", steps="[1, inf)", lr="(0, 1000]")

    def download_bytes(self, task: Task) -> int:
        return 4 * len(task.class_names)

    def init(self, task: Task, w: Tree) -> Server:
        return Server(w=w, extra={"weights": torch.ones(len(task.class_names))})

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, s.extra)

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        if self.beta == 0 and self.alpha == 1:  # all weights are 1: cross-entropy with its own rounding
            return super().objective(task, w, msg, mine, x, y)
        return weighted_cross_entropy(task.forward(w, x)[1], y, msg.extra["weights"])

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        state = super().server(task, s, updates)
        if self.beta == 0:
            return replace(state, extra={"weights": torch.full_like(s.extra["weights"], self.alpha)})
        if task.labelled is None:
            raise UserError(
                "federate.server.labelled", "ratio loss needs balanced labelled images on the server", "name a source"
            )
        weight, _ = task.head
        moves = []
        for c in range(len(task.class_names)):
            mine = [i for i, y in enumerate(task.labelled.labels.tolist()) if y == c]
            if not mine:
                name = task.class_names[c]
                raise UserError(
                    "federate.server.labelled", f"ratio loss needs images of every class, {name!r} has none"
                )
            x, y = task.labelled.normalised(mine), torch.full((len(mine),), c)

            def loss(w: Tree, step: int, x: Tensor = x, y: Tensor = y) -> Tensor:
                return cross_entropy(task.forward(w, x)[1], y)

            copy = descend(state.w, task.trainable, loss, partial(torch.optim.SGD, lr=self.lr), self.steps)
            moves.append(copy[weight] - state.w[weight])
        weights = ratio_weights(torch.stack(moves), self.alpha, self.beta)
        return replace(state, extra={"weights": weights / weights.mean() if self.normalise else weights})
