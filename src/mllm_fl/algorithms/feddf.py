"""FedDF.

Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning, 2020, arXiv:2006.07242,
Algorithm 1 and eq. (1).

    student starts at sum_k p_k w_k;  target(x) = softmax( mean_k logits_k(x) / T )
    per step: w <- Adam( KL( target || softmax(student / T) ), batch mean )

The received models teach in evaluation mode; the student is in training mode, so its BatchNorm statistics move to the server's images. What we change: 100 steps a round
(FEDIC, by CReFF's authors) in place of up to 10,000 with early stopping on a validation set that we do not have; the student starts at FedAvg's mean
where their code takes the uniform one, so that no step is FedAvg. All received models are held at once: memory grows with the online clients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Server, Task, Update, in_ranges
from mllm_fl.algorithms.distilling import lessons, unlabelled
from mllm_fl.descent import descend
from mllm_fl.losses import kl
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class FedDF(Algorithm):
    """``steps`` a round, of ``batch_size`` unlabelled images, Adam ``lr`` with cosine annealing, gradient norm clipped at 5 (their code)."""

    steps: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    temperature: float = 1.0
    max_norm: float = 5.0
    neutral: ClassVar[dict[str, Any]] = {"steps": 0}
    needs: ClassVar[tuple[str, ...]] = ("unlabelled",)

    def __post_init__(self) -> None:
        in_ranges(self, steps="[0, inf)", batch_size="[2, inf)")
        in_ranges(self, lr="(0, inf)", temperature="(0, inf)", max_norm="(0, inf)")

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        received = list(updates)
        state = super().server(task, s, received)
        if self.steps == 0:
            return state
        lesson = lessons(
            task, unlabelled(task, "FedDF"), [u.w for u in received], lambda z: z.mean(0),
            self.steps, self.batch_size, task.stream("distil", s.round + 1),
        )  # fmt: skip

        def loss(w: Tree, step: int) -> Tensor:
            x, ensemble = lesson(step)
            return kl(ensemble, task.forward(w, x)[1], self.temperature)  # eq. (1)

        w = descend(
            state.w, task.trainable, loss, partial(torch.optim.Adam, lr=self.lr), self.steps,
            max_norm=self.max_norm, anneal=True,
        )  # fmt: skip
        return replace(state, w=w)
