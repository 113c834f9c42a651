"""Stage 3, global alignment: after aggregation the server trains on a small class-balanced set.

MLLM-LLaVA-FL (arXiv:2409.06067), §3.3:

    (5)  w_agg <- w_agg - eta grad L_align(w_agg; D_align)
    (6)  L_align = L_ce(y, p) + beta KL(q || p),   p the model's output, q CLIP's zero-shot output

The paper gives no size, optimiser, step count or moment. Ours: SGD, all parameters, BatchNorm statistics frozen (a few
hundred images would bias them), after every aggregation, the aligned model is what the next round broadcasts.

With any method, the model that is evaluated and shipped is aligned, every leaf of it once. What is broadcast are the server's aligned weights w. A method
that deploys other leaves in their place (CReFF's and CLIP2FL's retrained head, a tau-normalised or CCVR's calibrated one) has these aligned in
their turn, on the aligned rest, by as many steps of the same eq. (5); they are not fed back into w. With ``when = "end"`` the rounds are the
method's own, and so are the means over rounds; the model that it deploys is aligned once, whole: ``last`` in final.json (``curve`` = "unaligned"), and the
same bits as ``mllm-fl align`` on the finished run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Server, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, augmented
from mllm_fl.errors import UserError
from mllm_fl.losses import alignment, kl
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone, why_not_finite

Control = Literal["ce", "kl", "uniform", "wrong", "alone", "clients"]


@dataclass(frozen=True)
class AlignConfig:
    """``[align]``: the alignment of the aggregated model.

    ``source``: "glyphs" (rendered for the class names), "leftover" (training images outside the long-tailed subset), "val" (ImageNet-LT's
    validation list), ``folder:PATH``, ``hf:NAME``, or ``open:PATH`` (those of a corpus or folder of open images that CLIP finds most like a class name).
    ``per_class``: images of each class; absent means 1,000 in all, at least one a class (100 of ten
    classes, 10 of a hundred: the size that FEDIC holds out; the paper says "small"), and of "val" all that every class has, 20.
    ``in_domain``: whether D_align is of the clients' own distribution; absent means yes for leftover and val, no for glyphs and open images, unknown for others.
    ``when``: after every aggregation, or once after the last. ``parameters``: what eq. (5) updates. ``scale_by_t2``: beta T^2 in the place of beta, as in
    distillation. ``refuse_below``: the teacher's least zero-shot accuracy on D_align, in multiples of chance; 0 asks for none.

    ``control``: one part of stage 3 taken away, to see what it was worth. "ce": labels only, the same as ``beta = 0``. "kl": q only, no labels.
    "uniform": q knows nothing. "wrong": q's classes are shifted by one, which must hurt. "alone": cross-entropy on D_align only, no client is ever
    asked; BatchNorm then learns D_align's statistics, there are no others. "clients": no alignment, D_align's images are dealt to the clients instead.
    """

    source: str = "leftover"
    per_class: int | None = None
    in_domain: bool | None = None
    beta: float = 1.0
    temperature: float = 1.0
    scale_by_t2: bool = False
    lr: float = 0.01
    momentum: float = 0.0
    steps: int = 100
    batch_size: int = 32
    when: Literal["every-round", "end"] = "every-round"
    parameters: Literal["all", "head"] = "all"
    freeze_batch_norm: bool = True
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
    control: Control | None = None
    refuse_below: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_class", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"align.{name}", f"{value} is below 1", "leave [align] out to switch alignment off")
        if not self.beta >= 0:
            raise UserError("align.beta", f"{self.beta} is negative", "0 is cross-entropy alone")
        if not self.temperature > 0:
            raise UserError("align.temperature", f"{self.temperature} is not positive")
        if not 0 < self.lr <= 1000:
            raise UserError("align.lr", f"{self.lr} is not in (0, 1000]")
        if not self.refuse_below >= 0:
            raise UserError("align.refuse_below", f"{self.refuse_below} is negative", "0 accepts any teacher")
        if self.beta == 0 and self.control in ("kl", "uniform", "wrong"):
            raise UserError("align.control", f"{self.control!r} is about q, which beta = 0 leaves out", "give beta > 0")
        if self.control == "alone" and self.when == "end":
            raise UserError("align.control", '"alone" has rounds of nothing but alignment', 'set when = "every-round"')

    @property
    def asks_teacher(self) -> bool:
        """Whether q is CLIP's."""
        return self.beta > 0 and self.control in (None, "kl", "wrong")


@dataclass(frozen=True)
class Aligner:
    """D_align with its teacher logits: ``x`` (n, 3, h, w) normalised, ``y`` (n,), ``q_logits`` (n, C); ready to be applied.

    ``teacher``: what a run notes about the CLIP that gave q; None without one. ``limit``: a weight beyond it in magnitude is divergence.
    ``zero_shot``: the teacher's own accuracy on D_align.
    """

    config: AlignConfig
    x: Tensor
    y: Tensor
    q_logits: Tensor
    teacher: Mapping[str, Any] | None = None
    limit: float = 1e6
    zero_shot: float | None = None

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Eq. (6) on these rows of D_align, or what the control leaves of it. ``logits`` (b, C), ``rows`` (b,). Shape ()."""
        c = self.config
        beta = c.beta * (c.temperature**2 if c.scale_by_t2 else 1.0)
        if c.control == "kl":
            return beta * kl(self.q_logits[rows], logits, c.temperature)
        if c.control in ("ce", "alone"):
            beta = 0.0
        return alignment(logits, self.y[rows], self.q_logits[rows], beta, c.temperature)

    def __call__(self, task: Task, w: Tree, round: int, only: Collection[str] | None = None) -> tuple[Tree, float]:
        """The aligned weights (eq. 5), and the mean alignment loss over the steps. ``w`` is not changed.

        ``only``: of the parameters that [align] updates, those that this call may, BatchNorm's statistics staying: the second turn of a
        method that deploys its own leaves.

        Raises:
            UserError: a weight is not finite, or beyond ``limit``.
        """
        c = self.config
        w = clone(w)
        names = [k for k in task.trainable if c.parameters == "all" or k in task.head]
        if only is not None:
            names = [k for k in names if k in only]
            if not names:
                return w, 0.0
        for k in names:
            w[k].requires_grad_(True)
        optimiser = torch.optim.SGD([w[k] for k in names], lr=c.lr, momentum=c.momentum)
        draws = stream(task.seed, "align", round) if only is None else stream(task.seed, "align", round, "deployed")
        train = only is None and (not c.freeze_batch_norm or c.control == "alone")
        view = LocalConfig(augment=c.augment, aug_mode="sample")
        order = torch.empty(0, dtype=torch.int64)
        total = 0.0
        for _ in range(c.steps):
            if len(order) < min(c.batch_size, len(self.y)):
                order = torch.cat([order, torch.randperm(len(self.y), generator=draws)])
            batch, order = order[: c.batch_size], order[c.batch_size :]
            x = augmented(self.x[batch], view, draws)
            loss = self.loss(task.forward(w, x, train=train)[1], batch)  # eq. (6)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss, inputs=[w[k] for k in names])
            optimiser.step()  # eq. (5)
            total += float(loss.detach())
        w = {k: v.detach() for k, v in w.items()}
        problem = why_not_finite({k: v for k, v in w.items() if v.dtype.is_floating_point}, self.limit)
        if problem:
            raise UserError(
                "align.lr", f"alignment diverged in round {round} ({problem})", "lower align.lr or align.steps"
            )
        return w, total / c.steps

    def rest(self, task: Task, w: Tree, aligned: Tree, round: int) -> Tree:
        """``w`` with those parameters aligned in which it differs from ``aligned``, which holds what is aligned already."""
        other = [k for k in task.trainable if not torch.equal(w[k], aligned[k])]
        return self(task, w, round, other)[0] if other else w


def delivered(method: Algorithm, task: Task, state: Server, aligner: Aligner | None) -> Tree:
    """The model of ``state`` that is evaluated and shipped: what the method deploys, aligned; ``state.w`` is so already, unless once at the end."""
    deployed = method.deploy(task, state)
    if aligner is None:
        return deployed
    if aligner.config.when == "end":
        return aligner(task, deployed, state.round)[0]
    return aligner.rest(task, deployed, state.w, state.round)


ZeroShot = Callable[[ImageSet], Tensor]  # images -> logits (n, C)


def make_aligner(config: AlignConfig, images: ImageSet, teacher: ZeroShot | None) -> Aligner:
    """D_align and q = CLIP's zero-shot logits on it, computed once: the teacher sees images un-augmented.

    Raises:
        UserError: the teacher's zero-shot accuracy on D_align is below ``config.refuse_below`` times chance: it would teach noise.
    """
    y = torch.from_numpy(images.labels)
    classes = len(images.class_names)
    x = images.normalised(range(len(images)))
    if teacher is None or not config.asks_teacher:
        return Aligner(config, x, y, torch.zeros(len(images), classes))
    q = teacher(images)
    if q.shape != (len(images), classes):
        raise UserError("teacher", f"zero-shot logits have shape {tuple(q.shape)}, expected {(len(images), classes)}")
    accuracy = float((q.argmax(1) == y).double().mean())
    floor = min(config.refuse_below / classes, (1 + 1 / classes) / 2)  # of two classes twice chance would be perfection
    if accuracy < floor:
        raise UserError(
            "teacher",
            f"zero-shot accuracy on the alignment images is {accuracy:.1%}, below {config.refuse_below:g} x chance ({floor:.1%})",
            "check the class names, the prompts and the teacher; align.refuse_below = 0 takes it all the same, beta = 0 does without",
        )
    q = q.float()
    return Aligner(config, x, y, q.roll(1, 1) if config.control == "wrong" else q, zero_shot=accuracy)
