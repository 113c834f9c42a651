"""Stage 3, global alignment: after aggregation the server trains on a small class-balanced set.

MLLM-LLaVA-FL (arXiv:2409.06067), §3.3:

    (5)  w_agg <- w_agg - eta grad L_align(w_agg; D_align)
    (6)  L_align = L_ce(y, p) + beta KL(q || p),   p the model's output, q CLIP's zero-shot output

The paper gives no size, optimiser, step count or moment. Ours: SGD, all parameters, BatchNorm statistics frozen (a few
hundred images would bias them), after every aggregation, the aligned model is what the next round broadcasts.

What is aligned are the server's weights w, which the next round broadcasts; a method's ``deploy`` comes after that. So the shipped model of
tau-normalisation is the normalised aligned one, and a head that CReFF retrains beside w is not aligned: final.json names such leaves in
``deployed_otherwise``. With ``when = "end"`` the rounds are those of the method alone, and so are the means over rounds; only ``last`` is the aligned
model (``curve`` = "unaligned"). ``mllm-fl align`` on a finished run aligns what was shipped, head included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mllm_fl.algorithms.base import Task
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation
from mllm_fl.data.folder import all_images
from mllm_fl.data.glyphs import glyph_set
from mllm_fl.data.imagenet_lt import load_list
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, augmented
from mllm_fl.errors import UserError
from mllm_fl.losses import alignment
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone


@dataclass(frozen=True)
class AlignConfig:
    """``[align]``: the alignment of the aggregated model.

    ``source``: "glyphs" (rendered for the class names), "leftover" (training images outside the long-tailed subset), "val" (ImageNet-LT's
    validation list), or ``folder:PATH``. ``per_class``: images of each class; absent means 1,000 in all, at least one a class (100 of ten
    classes, 10 of a hundred: the size that FEDIC holds out; the paper says "small"), and of "val" all that every class has, 20.
    ``when``: after every aggregation, or once after the last. ``parameters``: what eq. (5) updates.
    """

    source: str = "leftover"
    per_class: int | None = None
    beta: float = 1.0
    temperature: float = 1.0
    lr: float = 0.01
    momentum: float = 0.0
    steps: int = 100
    batch_size: int = 32
    when: Literal["every-round", "end"] = "every-round"
    parameters: Literal["all", "head"] = "all"
    freeze_batch_norm: bool = True
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
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


IMAGES = 1000
"""Alignment images in all, where ``per_class`` does not say."""


def alignment_set(config: AlignConfig, federation: Federation, data: DataConfig) -> ImageSet:
    """D_align: class-balanced server images from the source that [align] names, at the size and normalisation of the clients' images.

    Raises:
        UserError: an unknown source, a class that is missing or has too few images, nothing left over.
    """
    names, side = federation.class_names, int(federation.test.read([0]).shape[-1])
    per_class = config.per_class or max(1, IMAGES // len(names))
    draws = stream(config.seed, "d_align")
    if config.source == "leftover":
        return leftovers(federation, per_class, draws)
    if config.source == "glyphs":
        images, _ = glyph_set(names, per_class, config.seed, image_size=side, purpose="d_align")
    elif config.source == "val":
        if data.source != "imagenet-lt":
            raise UserError(
                "align.source",
                f"'val' is ImageNet-LT's validation list, but data.source is {data.source!r}",
                "use leftover or folder:PATH",
            )
        images = in_order_of(names, load_list(data.root, "val", side))
        per_class = config.per_class or min(images.class_counts())
    elif config.source.startswith("folder:"):
        images = in_order_of(names, all_images(config.source.removeprefix("folder:"), side))
    else:
        raise UserError("align.source", f"unknown source {config.source!r}", "use glyphs, leftover, val or folder:PATH")
    images = replace(images, mean=federation.train.mean, std=federation.train.std)
    return images if config.source == "glyphs" else balanced(images, per_class, draws)


def in_order_of(class_names: Sequence[str], images: ImageSet) -> ImageSet:
    """The images of these classes, labelled in their order; a folder's own classes are sorted by name.

    Raises:
        UserError: a class is missing.
    """
    missing = [n for n in class_names if n not in images.class_names]
    if missing:
        raise UserError("align.source", f"{images.name} has no class {missing[0]!r}", "one folder a class, same names")
    number = np.full(len(images.class_names), -1)
    number[[images.class_names.index(n) for n in class_names]] = np.arange(len(class_names))
    kept = images.subset(np.flatnonzero(number[images.labels] >= 0).tolist())
    return replace(kept, labels=number[kept.labels], class_names=tuple(class_names))


def balanced(images: ImageSet, per_class: int, generator: torch.Generator) -> ImageSet:
    """``per_class`` images of every class, drawn without replacement.

    Raises:
        UserError: a class has fewer; names it and both numbers.
    """
    labels = torch.from_numpy(images.labels)
    chosen: list[int] = []
    for c, name in enumerate(images.class_names):
        mine = torch.nonzero(labels == c).flatten()
        if len(mine) < per_class:
            raise UserError(
                "align.per_class",
                f"class {name!r} has {len(mine)} images in {images.name}, {per_class} asked for",
                "ask for fewer",
            )
        chosen += mine[torch.randperm(len(mine), generator=generator)[:per_class]].tolist()
    return images.subset(chosen, f"{images.name}, {per_class} a class")


def leftovers(federation: Federation, per_class: int, generator: torch.Generator) -> ImageSet:
    """``per_class`` training images of every class that no client holds.

    CReFF's long tail keeps the largest class whole, so that class has none left: what is missing is drawn from the images
    that clients hold too, and the set's name says how many. The paper does not say where its images come from.

    Raises:
        UserError: nothing is left over, because the clients hold every training image.
    """
    candidates, held_too = [], 0
    held = torch.from_numpy(federation.held)
    labels = torch.from_numpy(federation.train.labels)
    spare = torch.zeros_like(held)
    spare[list(federation.spare) if federation.spare is not None else ~held] = True
    if not bool(spare.any()):
        raise UserError(
            "align.source",
            f"no image is left over: the clients hold all {int(held.sum())} that are at hand",
            "cut a long tail (data.imbalance_factor), or use glyphs, val or folder:PATH",
        )
    for c in range(len(federation.class_names)):
        free, rest = (torch.nonzero((labels == c) & m).flatten() for m in (spare, held))
        short = max(0, per_class - len(free))
        candidates += free.tolist() + rest[torch.randperm(len(rest), generator=generator)[:short]].tolist()
        held_too += min(short, len(rest))
    name = f"{federation.train.name} leftover" + (f" ({held_too} of them also at clients)" if held_too else "")
    return balanced(federation.train.subset(candidates, name), per_class, generator)


@dataclass(frozen=True)
class Aligner:
    """D_align with its teacher logits: ``x`` (n, 3, h, w) normalised, ``y`` (n,), ``q_logits`` (n, C); ready to be applied.

    ``teacher``: what a run notes about the CLIP that gave q; None without one.
    """

    config: AlignConfig
    x: Tensor
    y: Tensor
    q_logits: Tensor
    teacher: Mapping[str, Any] | None = None

    def __call__(self, task: Task, w: Tree, round: int) -> tuple[Tree, float]:
        """The aligned weights (eq. 5), and the mean alignment loss over the steps. ``w`` is not changed."""
        c = self.config
        w = clone(w)
        names = [k for k in task.trainable if c.parameters == "all" or k.startswith("classifier.")]
        for k in names:
            w[k].requires_grad_(True)
        optimiser = torch.optim.SGD([w[k] for k in names], lr=c.lr, momentum=c.momentum)
        draws = stream(task.seed, "align", round)
        view = LocalConfig(augment=c.augment, aug_mode="sample")
        order = torch.empty(0, dtype=torch.int64)
        total = 0.0
        for _ in range(c.steps):
            if len(order) < min(c.batch_size, len(self.y)):
                order = torch.cat([order, torch.randperm(len(self.y), generator=draws)])
            batch, order = order[: c.batch_size], order[c.batch_size :]
            x = augmented(self.x[batch], view, draws)
            logits = task.forward(w, x, train=not c.freeze_batch_norm)[1]
            loss = alignment(logits, self.y[batch], self.q_logits[batch], c.beta, c.temperature)  # eq. (6)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss, inputs=[w[k] for k in names])
            optimiser.step()  # eq. (5)
            total += float(loss.detach())
        return {k: v.detach() for k, v in w.items()}, total / c.steps


ZeroShot = Callable[[Tensor], Tensor]  # uint8 images (n, 3, h, w) -> logits (n, C)


def make_aligner(
    config: AlignConfig, images: ImageSet, teacher: ZeroShot | None, *, refuse_below: float = 2.0
) -> Aligner:
    """D_align and q = CLIP's zero-shot logits on it, computed once: the teacher sees images un-augmented.

    Raises:
        UserError: the teacher's zero-shot accuracy on D_align is below ``refuse_below`` times chance: it would teach noise.
    """
    every = range(len(images))
    y = torch.from_numpy(images.labels)
    classes = len(images.class_names)
    if teacher is None or config.beta == 0:
        return Aligner(config, images.normalised(every), y, torch.zeros(len(images), classes))
    q = teacher(images.read(every))
    if q.shape != (len(images), classes):
        raise UserError("teacher", f"zero-shot logits have shape {tuple(q.shape)}, expected {(len(images), classes)}")
    accuracy = float((q.argmax(1) == y).double().mean())
    floor = min(refuse_below / classes, (1 + 1 / classes) / 2)  # with two classes twice chance would be perfection
    if accuracy < floor:
        raise UserError(
            "teacher",
            f"zero-shot accuracy on the alignment images is {accuracy:.1%}, below {refuse_below:g} x chance ({floor:.1%})",
            "check the class names, the prompts and the teacher; beta = 0 aligns without it",
        )
    return Aligner(config, images.normalised(every), y, q.float())
