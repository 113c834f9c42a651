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

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Shard, Task, Update, in_ranges
from mllm_fl.data.dsa import siamese
from mllm_fl.matching import Sums, class_gradients, fresh_state, gathering, gradient_form, match_and_retrain
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
    uploads: ClassVar[str] = "for each class it holds, the mean gradient of the head: C (d + 1) floats"
    downloads: ClassVar[str] = "the retrained head: C (d + 1) floats"

    def __post_init__(self) -> None:
        for name in vars(self):
            least = int(name in ("features", "head_batch", "repeats", "images"))
            in_ranges(self, **{name: f"[{least}, inf)"})

    def upload_bytes(self, task: Task, present: int) -> int:
        return present * self.download_bytes(task)

    def download_bytes(self, task: Task) -> int:
        return sum(task.net.get_parameter(k).nbytes for k in task.head) if self.retrain else 0

    def upload_form(self, task: Task) -> dict[str, Tree]:
        return gradient_form(*(task.net.get_parameter(k) for k in task.head)) if self.retrain else {}

    def init(self, task: Task, w: Tree) -> Server:
        if not self.retrain:
            return Server(w=w)
        draws = task.stream("federated features"), task.stream("head", 0)
        return Server(w, fresh_state(w[task.head[0]], self.features, *draws))

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, prefixed(under(s.extra, "head/"), "head/"))

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        """The gradients that ``finish`` sends, at w^t, before any local step; they are not remembered."""
        if not self.retrain:
            return {}
        head = msg.extra["head/weight"], msg.extra["head/bias"]

        def feature_of(positions: list[int], draws: torch.Generator) -> Tensor:
            x = shard.x(positions).to(head[0])
            return task.forward(msg.w, siamese(x, draws) if self.dsa else x, train=False)[0]

        return class_gradients(shard.y, feature_of, shard.stream, *head, self.repeats, self.images)

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, _ = super().finish(task, local, msg, mine)
        return update._replace(extra=mine), {}

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        if not self.retrain:
            return super().server(task, s, updates)
        sums: Sums = {}
        s = super().server(task, s, gathering(updates, sums))  # w^{t+1} is FedAvg's
        kept = match_and_retrain(
            s.extra, sums, task.stream("head", s.round + 1), match_steps=self.match_steps, match_lr=self.match_lr,
            head_epochs=self.head_epochs, head_lr=self.head_lr, head_batch=self.head_batch,
        )  # fmt: skip
        return replace(s, extra=kept)

    def deploy(self, task: Task, s: Server) -> Tree:
        weight, bias = task.head
        return s.w | ({weight: s.extra["head/weight"], bias: s.extra["head/bias"]} if self.retrain else {})
