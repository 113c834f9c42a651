"""CLIP2FL.

Shi, Zheng, Yin, Lu, Xie, Qu: CLIP-Guided Federated Learning on Heterogeneous and Long-Tailed Data, 2024, arXiv:2312.08648.
CReFF (arXiv:2204.13399) with a frozen CLIP at both ends; see creff.py for its round. What is added:

    client k   minimises CE + alpha T^2 KL(softmax(clip / T) || softmax(student / T))                                eq. (1)
    server     features V: SGD on  sum_{c seen} D(grad_h CE(h(V_c), c), g_c) + contrast * PCL(V, texts)              eq. (8)
               PCL = mean_i -[ s_iy - log( (M - 1) e^{s_iy} + M sum_{c != y} e^{s_ic} ) ],  s_ic = f_i . t_c / tau,  M = features

clip: the teacher's zero-shot logits on a client's un-augmented images, constants; t_c: its unit text embeddings. PCL runs over the features of all
classes, so that those of classes unseen in a round move too. Numbers are those of the authors' code as of May 2024.

What we changed: CReFF's list; CLIP's logits have the model's own learned scale (theirs a fixed 100, which OpenAI's weights learned too); the teacher sees an image once, not once per batch; underscores in class names are spaces (theirs stay:
``teacher.keep_underscores``). Their student has a linear adapter to CLIP's width: set ``model.adapter = "linear"`` and ``adapter_dim`` to the texts' width.

Doubts: CReFF's; alpha was 2 until May 2024 and contrast 0.5 until April 2024 in their code, after the paper, whose tables may be of either.
Features are not normalised in PCL. ``alpha=0, contrast=0`` is CReFF bit for bit, with ``retrain=False`` FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Shard, Task, Update, in_ranges
from mllm_fl.data.dsa import siamese
from mllm_fl.errors import UserError
from mllm_fl.losses import cross_entropy, distillation
from mllm_fl.matching import (
    Sums,
    class_gradients,
    fresh_state,
    gathering,
    gradient_form,
    match_and_retrain,
    prototype_contrast_gradient,
)
from mllm_fl.trees import Tree, prefixed, under


@dataclass(frozen=True)
class CLIP2FL(Algorithm):
    """``alpha``, ``temperature``: of the distillation; ``contrast``, ``contrast_temperature``: lambda and tau of PCL; the rest is CReFF's."""

    alpha: float = 1.0
    temperature: float = 3.0
    contrast: float = 0.001
    contrast_temperature: float = 0.1
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
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0, "contrast": 0.0, "retrain": False}
    uploads: ClassVar[str] = "for each class it holds, the mean gradient of the head: C (d + 1) floats"
    downloads: ClassVar[str] = "the retrained head: C (d + 1) floats"
    needs: ClassVar[tuple[str, ...]] = ("teacher", "texts")

    def __post_init__(self) -> None:
        for name in vars(self):
            least = "0.001" if "temperature" in name else int(name in ("features", "head_batch", "repeats", "images"))
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
        self._pull(task, w[task.head[0]])  # refuses texts that do not fit, before the first round
        draws = task.stream("federated features"), task.stream("head", 0)
        return Server(w, fresh_state(w[task.head[0]], self.features, *draws))

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, prefixed(under(s.extra, "head/"), "head/"))

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        """CLIP's logits for ``objective`` and the gradients that ``finish`` sends, at w^t; neither is remembered."""
        if self.alpha > 0 and shard.teacher is None:
            raise UserError("federate.algorithm", "CLIP2FL has no teacher's logits", "give [teacher], or alpha = 0")
        taught: Tree = {"each/teacher": shard.teacher} if self.alpha > 0 and shard.teacher is not None else {}
        if not self.retrain:
            return taught
        head = msg.extra["head/weight"], msg.extra["head/bias"]

        def feature_of(positions: list[int], draws: torch.Generator) -> Tensor:
            x = shard.x(positions).to(head[0])
            return task.forward(msg.w, siamese(x, draws) if self.dsa else x, train=False)[0]

        return taught | class_gradients(shard.y, feature_of, shard.stream, *head, self.repeats, self.images)

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        logits = task.forward(w, x)[1]  # eq. (1)
        if self.alpha == 0:
            return cross_entropy(logits, y)
        taught = distillation(mine["each/teacher"].to(logits), logits, self.temperature)
        return cross_entropy(logits, y) + self.alpha * taught

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, _ = super().finish(task, local, msg, mine)
        return update._replace(extra=mine), {}

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        if not self.retrain:
            return super().server(task, s, updates)
        sums: Sums = {}
        s = super().server(task, s, gathering(updates, sums))
        kept = match_and_retrain(
            s.extra, sums, task.stream("head", s.round + 1), match_steps=self.match_steps, match_lr=self.match_lr,
            head_epochs=self.head_epochs, head_lr=self.head_lr, head_batch=self.head_batch,
            pull=self._pull(task, s.extra["features"]),  # eq. (8)
        )  # fmt: skip
        return replace(s, extra=kept)

    def _pull(self, task: Task, like: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """contrast * the gradient of PCL against the class names' texts; None where ``contrast`` is 0."""
        if self.contrast == 0:
            return None
        if task.texts is None:
            raise UserError("federate.algorithm", "CLIP2FL has no text embeddings", "give [teacher], or contrast = 0")
        texts = task.texts.to(like)
        if texts.shape[1] != like.shape[1]:
            raise UserError(
                "model.adapter_dim",
                f"CLIP2FL contrasts features of width {like.shape[1]} with the teacher's texts of width {texts.shape[1]}",
                f'set model.adapter = "linear" and model.adapter_dim = {texts.shape[1]}, or contrast = 0',
            )
        setting = texts, self.contrast_temperature, self.features
        return lambda f, y: self.contrast * prototype_contrast_gradient(f, y, *setting)

    def deploy(self, task: Task, s: Server) -> Tree:
        weight, bias = task.head
        return s.w | ({weight: s.extra["head/weight"], bias: s.extra["head/bias"]} if self.retrain else {})
