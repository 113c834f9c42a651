"""``[pretrain]``: everything that stage 1b can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm_fl.errors import UserError


@dataclass(frozen=True)
class PretrainConfig:
    """``[pretrain]``: how the compact model learns from the corpus.

    What is learned. ``teacher``: "mini", a folder in Hugging Face's layout, or a hub id (families: ``models/teacher/families.py``).
    ``corpus``: a ready corpus, a folder with records.json or a file in LLaVA's form with its pictures beside it, in the place of [annotate].
    ``form``: "chat", each record as a conversation in the teacher's own form, or "plain", the picture and what is said about it.
    ``objective``: "lm" is the paper's; "features" is the mean squared error to CLIP's features without the language model.
    ``feature_mse``: weight of that error beside "lm"; ``lm_samples`` then lets only so many of a batch's conversations into the
    language model, which is the costly part, and absent means all. ``max_tokens``: longest conversation, picture included. ``image_size``:
    pixels a side of the compact model's input; absent means, for ResNet-8, four times the teacher's grid, so that its map has one position
    for each of the teacher's features (64 for a grid of 16, 16 for the bundled 4); for another network, the federation's image
    size, and the map is resized to the grid.

    How alpha moves. "paper": a cosine from 0 to 1 over the fraction ``alpha_until`` of the steps, then 1; "linear": the same as a straight
    line; "stepwise": the same in ``alpha_levels`` equal steps; "constant": ``alpha_value`` throughout; "one" or "none": no blend, the
    compact model alone from the beginning; "zero": CLIP alone (teaches nothing, a check).

    How it is optimised. ``steps``: optimiser steps; ``epochs``, when given, takes their place. ``schedule``: the learning rate after the
    warm-up, whatever alpha does. ``drive``: what makes a step while alpha, and with it the gradient, is small: "adam", whose normalisation
    turns it into a full step all the same (AdamW, the paper is silent); "alpha", AdamW with lr times alpha; "sgd", whose step is as small as
    the gradient (momentum is ``betas[0]``). ``eps`` of AdamW does the same when it is of the gradient's size.

    What it runs on. ``micro_batch``: conversations at a time in the language model, gradients added up (absent: all of the
    batch); the compact model sees the whole batch in any case, so BatchNorm and the loss do not depend on it. ``precision``: "bf16" is
    autocast with frozen weights in bf16, the compact model's weights stay fp32; "auto": bf16 on a GPU. ``gradient_checkpointing``: the
    language model's layers are computed twice and their inner values not kept. ``shard``: under torchrun, the frozen layers lie in parts on all
    processes (FSDP). ``overfit``: so many steps on one batch before training; the loss must fall.

    What is handed over. ``hand_over``: backbone and adapter, or the backbone with a fresh adapter. ``classifier``: "fresh", or "text": from
    the zero-shot teacher's text embeddings of the class names. (``model.feature_norm`` is the third of these options.)
    """

    teacher: str = "mini"
    corpus: str | None = None
    form: Literal["chat", "plain"] = "chat"
    steps: int = 400
    epochs: float | None = None
    batch_size: int = 128
    micro_batch: int | None = None
    lr: float = 2e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    drive: Literal["adam", "alpha", "sgd"] = "adam"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    alpha: Literal["paper", "linear", "stepwise", "constant", "none", "one", "zero"] = "paper"
    alpha_until: float = 0.5
    alpha_levels: int = 4
    alpha_value: float = 1.0
    objective: Literal["lm", "features"] = "lm"
    feature_mse: float = 0.0
    lm_samples: int | None = None
    hand_over: Literal["adapter", "backbone"] = "adapter"
    classifier: Literal["fresh", "text"] = "fresh"
    max_tokens: int = 512
    image_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    shard: bool = False
    overfit: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_tokens", "checkpoint_every", "alpha_levels"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"pretrain.{name}",
                    f"{getattr(self, name)} is below 1",
                    "leave [pretrain] out to switch pretraining off",
                )
        for name, low, high in (
            ("warmup", 0.0, 1.0),
            ("alpha_until", 0.0, 1.0),
            ("alpha_value", 0.0, 1.0),
            ("lr", 0.0, 10.0),
            ("eps", 0.0, 1.0),
            ("feature_mse", 0.0, 1e6),
            ("weight_decay", 0.0, 10.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"pretrain.{name}", f"{getattr(self, name)} is outside {low:g} .. {high:g}")
        if self.lm_samples is not None and not (0 < self.lm_samples <= self.batch_size and self.feature_mse > 0):
            raise UserError(
                "pretrain.lm_samples",
                f"{self.lm_samples} must be in 1 .. batch_size, and needs feature_mse for the other samples",
                "leave it out to use the whole batch",
            )
        for name in ("micro_batch", "overfit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"pretrain.{name}", f"{getattr(self, name)} is below 1", "leave it out")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError("pretrain.epochs", f"{self.epochs} is not positive", "leave it out to give steps instead")
        if not self.grad_clip > 0 or not all(0 <= b < 1 for b in self.betas):
            raise UserError("pretrain.grad_clip", "grad_clip must be positive, betas in [0, 1)")

    @property
    def needs_clip(self) -> bool:
        """Whether any step asks for CLIP's features."""
        return self.objective == "features" or self.feature_mse > 0 or self.alpha not in ("one", "none")
