"""CCVR.

Luo, Chen, Hu, Zhang, Liang, Feng: No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data, 2021,
arXiv:2106.05001, eq. (3)-(5) and section 4.2.

    after the last round every client sends, for each class it holds, n_kc and mean and covariance of the final model's features;
    the server pools them exactly (``statistics.pooled_moments``), draws ``samples`` features a class from N(mean_c, cov_c)
    and retrains the classifier alone on them, from where FedAvg left it

Post-hoc: the rounds are FedAvg's, so it also runs on a finished FedAvg run (``--from``). Their code is not public; the retraining schedule (10 epochs, SGD 0.01, momentum 0.9, weight decay 1e-5, batch
64) is that of third-party ports, and 2,000 samples a class their choice for ten classes. Pooled ReLU features are never negative and Gaussian draws are; they are
left as drawn. A class with one image in the whole federation has covariance zero: its draws are that image's feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Server, Shard, Task, empty_leaf, in_ranges
from mllm_fl.descent import batches, descend
from mllm_fl.losses import cross_entropy
from mllm_fl.statistics import gaussian, moments, pooled_moments
from mllm_fl.trees import Tree, prefixed


@dataclass(frozen=True)
class CCVR(Algorithm):
    """``samples``: drawn features a class, 0 is FedAvg. ``epochs``, ``lr``, ``batch_size``: of the classifier's retraining."""

    samples: int = 2000
    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 64
    neutral: ClassVar[dict[str, Any]] = {"samples": 0}
    uploads: ClassVar[str] = "once, after the last round: count, feature mean and covariance of each class"
    concludes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        in_ranges(self, samples="[0, inf)", epochs="[1, inf)", batch_size="[1, inf)", lr="(0, 1000]")

    def upload_bytes(self, task: Task, present: int) -> int:
        """Once, not in every round."""
        width = task.net.get_parameter(task.head[0]).shape[1]
        return present * (8 + 4 * width + 4 * width**2) if self.samples else 0

    def survey_form(self, task: Task) -> dict[str, Tree]:
        width = task.net.get_parameter(task.head[0]).shape[1]
        one = {"n": empty_leaf(1, dtype=torch.int64), "mean": empty_leaf(width), "cov": empty_leaf(width, width)}
        return {f"{c}": prefixed(one, f"{c}/") for c in range(len(task.class_names))} if self.samples else {}

    def survey(self, task: Task, msg: Broadcast, shard: Shard) -> Tree:
        if self.samples == 0:
            return {}
        with torch.no_grad():
            parts = [
                task.forward(msg.w, shard.x(b.tolist()), train=False)[0] for b in torch.arange(len(shard)).split(500)
            ]
        features = torch.cat(parts)
        answer: Tree = {}
        for c in shard.y.unique().tolist():
            n, mean, covariance = moments(features[shard.y == c])
            answer |= {f"{c}/n": torch.tensor([n]), f"{c}/mean": mean.float(), f"{c}/cov": covariance.float()}
        return answer

    def conclude(self, task: Task, s: Server, answers: Iterable[tuple[int, Tree]]) -> Server:
        sent = [a for _, a in answers]
        features, labels = [], []
        for c in range(len(task.class_names)):
            parts = [(int(a[f"{c}/n"]), a[f"{c}/mean"], a[f"{c}/cov"]) for a in sent if f"{c}/n" in a]
            if parts and self.samples:
                _, mean, covariance = pooled_moments(parts)  # eq. (4), (5)
                features.append(gaussian(mean, covariance, self.samples, task.stream("virtual", c)).float())
                labels.append(torch.full((self.samples,), c))
        if not features:
            return s
        z, y = torch.cat(features), torch.cat(labels)
        weight, bias = task.head
        steps = self.epochs * -(-len(y) // self.batch_size)
        order = batches(len(y), self.batch_size, steps, task.stream("calibrate"))

        def loss(w: Tree, step: int) -> Tensor:
            b = order[step]
            return cross_entropy(z[b] @ w[weight].T + w[bias], y[b])

        head = {k: s.w[k] for k in task.head}
        optimiser = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=1e-5)
        return replace(s, w=s.w | descend(head, task.head, loss, optimiser, steps))
