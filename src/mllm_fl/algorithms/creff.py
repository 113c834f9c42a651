"""CReFF.

Shang, Lu, Huang, Wang: Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training with Federated
Features, 2022, arXiv:2204.13399, Algorithm 1. A round, with h the last retrained head (random before the first round):

    client k   g_{k,c} = grad_h CE(h(backbone of w^t (images of class c)), c)   for every class c it holds; then as FedAvg
    server     w^{t+1} as FedAvg;   g_c = mean over clients of g_{k,c}
               federated features V: SGD on  sum_{c seen} D(grad_h CE(h(V_c), c), g_c),  D = sum over rows of (1 - cosine)
               h <- a new random head, trained by SGD on all features V
    deployed   backbone of w^{t+1} with h;  h is never fed back into w

g_{k,c} is the mean over 10 draws of at most 32 images, each under one differentiable Siamese augmentation, in evaluation
mode. Numbers are those of the authors' code (the paper gives no other).

What we changed: gradients are in closed form, the classes are matched in one tensor program (mllm_fl.matching), and DSA draws from
named streams (theirs re-seeds the global stream by the clock).

Doubts. The mean over clients is unweighted, as in their code. The cosine's 1e-6 is added to a product of norms: where
gradients are tiny, D is not scale-free. Stage 3 aligns w with w's own head: h, trained before, is deployed on the aligned backbone.
``retrain=False`` keeps no features, asks for no gradients and deploys w with its own head, which is FedAvg bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Shard, Task, Update
from mllm_fl.data.dsa import siamese
from mllm_fl.errors import UserError
from mllm_fl.matching import (
    Sums,
    add_gradients,
    class_gradients,
    feature_match,
    fresh_head,
    mean_gradients,
    retrain_head,
)
from mllm_fl.trees import Tree, prefixed, under


@dataclass(frozen=True)
class CReFF(Algorithm):
    """Defaults are those of the authors' code.

    ``features``: per class, kept by the server between rounds. ``match_steps``, ``match_lr``: of SGD on the features.
    ``head_epochs``, ``head_lr``, ``head_batch``: of SGD on the new head. ``repeats``, ``images``: draws per class at a client, and
    images in a draw at most. ``dsa``: augment each draw. ``retrain``: False switches all of it off.
    """

    features: int = 100
    match_steps: int = 100
    match_lr: float = 0.1
    head_epochs: int = 300
    head_lr: float = 0.01
    head_batch: int = 32
    repeats: int = 10
    images: int = 32
    dsa: bool = True
    retrain: bool = True
    neutral: ClassVar[dict[str, Any]] = {"retrain": False}
    uploads: ClassVar[str] = (
        "for each class a client holds, the mean gradient of the head on its images: C (d + 1) floats"
    )
    downloads: ClassVar[str] = "the retrained head: C (d + 1) floats"

    def __post_init__(self) -> None:
        for name in ("features", "head_batch", "repeats", "images"):
            if getattr(self, name) < 1:
                raise UserError(f"federate.method.{name}", f"CReFF needs at least 1, not {getattr(self, name)}")
        for name in ("match_steps", "match_lr", "head_epochs", "head_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"federate.method.{name}", f"CReFF needs a number >= 0, not {getattr(self, name)}")

    def upload_bytes(self, task: Task, present: int) -> int:
        return present * self.download_bytes(task)

    def download_bytes(self, task: Task) -> int:
        return sum(task.net.get_parameter(k).nbytes for k in task.head) if self.retrain else 0

    def init(self, task: Task, w: Tree) -> Server:
        if not self.retrain:
            return Server(w=w)
        like = w[task.head[0]]
        drawn = torch.randn(self.features * len(like), like.shape[1], generator=task.stream("federated features"))
        weight, bias = fresh_head(like, task.stream("head", 0))
        return Server(
            w, {k: v.to(like) for k, v in (("features", drawn), ("head/weight", weight), ("head/bias", bias))}
        )

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, prefixed(under(s.extra, "head/"), "head/"))

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        """The gradients that ``finish`` sends, at w^t, before any local step; they are not remembered."""
        if not self.retrain:
            return mine
        head = msg.extra["head/weight"], msg.extra["head/bias"]

        def feature_of(positions: list[int], draws: torch.Generator) -> Tensor:
            x = shard.x(positions)
            return task.forward(msg.w, (siamese(x, draws) if self.dsa else x).to(head[0]), train=False)[0]

        return mine | class_gradients(
            shard.y, feature_of, shard.stream, *head, repeats=self.repeats, images=self.images
        )

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, kept = super().finish(task, local, msg, mine)
        answers = {k: v for k, v in mine.items() if k.startswith("grad/")}
        return update._replace(extra=answers), {k: v for k, v in kept.items() if k not in answers}

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        if not self.retrain:
            return super().server(task, s, updates)
        sums: Sums = {}

        def watched() -> Iterator[Update]:
            nonlocal sums
            for u in updates:
                sums = add_gradients(sums, u.extra)
                yield u

        s = super().server(task, s, watched())
        features, weight, bias = (s.extra[k] for k in ("features", "head/weight", "head/bias"))
        labels = torch.arange(len(bias), device=bias.device).repeat_interleave(self.features)
        means = mean_gradients(sums, len(bias))
        if means is not None:
            features = feature_match(features, labels, *means, weight, bias, steps=self.match_steps, lr=self.match_lr)
        draws = task.stream("head", s.round + 1)
        weight, bias = retrain_head(
            features, labels, *fresh_head(weight, draws), draws,
            epochs=self.head_epochs, lr=self.head_lr, batch=self.head_batch,
        )  # fmt: skip
        return replace(s, extra={"features": features, "head/weight": weight, "head/bias": bias})

    def deploy(self, task: Task, s: Server) -> Tree:
        if not self.retrain:
            return s.w
        return s.w | dict(zip(task.head, (s.extra["head/weight"], s.extra["head/bias"]), strict=True))
