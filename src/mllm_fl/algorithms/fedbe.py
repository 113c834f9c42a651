"""FedBE.

Chen, Chao: FedBE: Making Bayesian Model Ensemble Applicable to Federated Learning, 2021, arXiv:2009.01974, Algorithm 1.

    per tensor: u_k = (w_k - w^t) / ||w_k - w^t||,  mu = mean_k u_k,  sigma^2 = max( mean_k u_k^2 - mu^2, 1e-5 ),  r = mean_k ||w_k - w^t||
    samples:  w^t + r (mu + variance sigma eps),  eps ~ N(0, 1)
    teachers: FedAvg's mean, the samples, the received models;   target = sharpen( mean softmax ), p^(1/0.5) renormalised
    student starts at FedAvg's mean, SGD on KL( target || student ); the next model is the average of its later steps (SWA)

Follows the released code where it says more than the paper (normalised updates, variance 0.1, momentum 0.9, weight decay 1e-5, and the loss as a mean over *elements*, 1/C of the batch mean).
What we change: at most 100 steps a round in place of 20 epochs (1,560 steps), so SWA starts at half of them, every 5 steps, and the weights hardly leave FedAvg's mean (about
100 lr / (1 - 0.9) / C times the gradient): what then moves fully are BatchNorm's statistics, towards the unlabelled images; BatchNorm statistics
of a sample are FedAvg's; the variance's floor applies only where clients differ at all, so that identical clients give samples equal to them (their
floor would add noise of 0.1 sqrt(1e-5) r even then); the averaged student's statistics are taken from its own last step rather than from another pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Server, Task, Update, in_ranges
from mllm_fl.algorithms.distilling import lessons, unlabelled
from mllm_fl.descent import descend
from mllm_fl.losses import ensemble_kl, sharpened
from mllm_fl.trees import Tree, weighted_mean


def sampled(
    anchor: Tree, models: Sequence[Tree], names: Sequence[str], scale: float, generator: torch.Generator
) -> Tree:
    """One draw from the Gaussian over normalised updates, per tensor; the leaves ``names`` only. Scale 0 is its mean.

    A tensor that no client has moved stays where it is.
    """
    out: Tree = {}
    for k in names:
        moves = torch.stack([m[k] - anchor[k] for m in models])
        norms = moves.flatten(1).norm(dim=1)
        units = moves / norms.clamp_min(torch.finfo(moves.dtype).tiny).view(-1, *[1] * (moves.dim() - 1))
        mean = units.mean(0)
        spread = units.square().mean(0) - mean.square()
        alike = bool((moves == moves[0]).all())
        sigma = torch.zeros_like(mean) if alike else spread.clamp_min(1e-5).sqrt()
        noise = torch.randn(mean.shape, generator=generator)
        out[k] = anchor[k] + norms.mean() * (mean + scale * sigma * noise)
    return out


@dataclass(frozen=True)
class FedBE(Algorithm):
    """``samples`` drawn models; ``variance`` scales their spread; ``sharpen`` is the exponent; ``average_every`` steps enter the average."""

    steps: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    samples: int = 10
    variance: float = 0.1
    sharpen: float = 2.0
    average_every: int = 5
    neutral: ClassVar[dict[str, Any]] = {"steps": 0}
    needs: ClassVar[tuple[str, ...]] = ("unlabelled",)

    def __post_init__(self) -> None:
        in_ranges(self, steps="[0, inf)", batch_size="[2, inf)", samples="[0, inf)", average_every="[1, inf)")
        in_ranges(self, lr="(0, inf)", sharpen="(0, inf)", variance="[0, inf)")

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        received = list(updates)
        state = super().server(task, s, received)
        if self.steps == 0:
            return state
        models, draws = [u.w for u in received], task.stream("posterior", s.round + 1)
        samples = [state.w | sampled(s.w, models, task.trainable, self.variance, draws) for _ in range(self.samples)]
        lesson = lessons(
            task, unlabelled(task, "FedBE"), [state.w, *samples, *models],
            lambda z: sharpened(z.softmax(-1).mean(0), self.sharpen),
            self.steps, self.batch_size, task.stream("distil", s.round + 1),
        )  # fmt: skip
        late: list[Tree] = []

        def loss(w: Tree, step: int) -> Tensor:
            x, target = lesson(step)
            return ensemble_kl(target, task.forward(w, x)[1]) / len(task.class_names)

        def after(w: Tree, step: int) -> None:
            done = step + 1
            if done > self.steps // 2 and (done % self.average_every == 0 or done == self.steps):
                late.append({k: w[k].detach().clone() for k in task.trainable})

        optimiser = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=1e-5)
        last = descend(state.w, task.trainable, loss, optimiser, self.steps, after=after)
        return replace(state, w=last | weighted_mean((1.0, w) for w in late))  # SWA
