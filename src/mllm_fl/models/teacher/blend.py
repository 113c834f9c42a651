"""Dynamic weighted pretraining inside a frozen LLaVA: Z_v = (1 - alpha) g(X) + alpha g_fl(X) (arXiv:2409.06067, eq. 2).

Two forms of the same sum. ``blended`` hooks the projector's input and leaves the rest of the model as it is: the reference, for every family.
``lm_loss`` computes the same loss from features g(X) that were computed before, or from none when alpha = 1, where the family allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.teacher.families import marks
from mllm_fl.models.teacher.llava import LlavaTeacher


def blend(z: Tensor, student: Tensor, alpha: float) -> Tensor:
    """Eq. (2). ``z`` = g(X) and ``student`` = g_fl(X), both (n, tokens, width); alpha = 1 is g_fl(X) itself.

    Raises:
        UserError: shapes differ; names both.
    """
    if z.shape != student.shape:
        raise UserError(
            "teacher", f"CLIP gives features of shape {tuple(z.shape[1:])}, the compact model {tuple(student.shape[1:])}",
            "set model.adapter_dim to the teacher's width",
        )  # fmt: skip
    if alpha == 1:
        return student
    return (1 - alpha) * z + alpha * student


@contextmanager
def blended(teacher: LlavaTeacher, alpha: float, student: Tensor) -> Iterator[None]:
    """Inside, the projector of ``teacher`` sees the blend of its own input and ``student`` (n, grid * grid, width), row by row."""
    student = teacher.family.pack(student, teacher.config, teacher.place)

    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (blend(args[0], student, alpha), *args[1:])

    handle = teacher.projector.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def token_loss(logits: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
    """Cross-entropy of each next token, summed and divided by ``count``; absent: by how many are predicted here, their mean. Shape ().

    ``logits`` (n, t, V) and ``labels`` (n, t) at the same positions; label -100 is not predicted. ``count`` makes parts of a batch add up.
    """
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    flat = logits.float().flatten(0, 1)
    if count is None:
        return F.cross_entropy(flat, shifted)
    return F.cross_entropy(flat, shifted, reduction="sum") / count


def lm_loss(
    teacher: LlavaTeacher,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    student: Tensor,
    alpha: float,
    z: Tensor | None = None,
    *,
    images: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """The model's language-modelling loss with eq. (2) at the projector's input. Shape ().

    ``ids``, ``mask``, ``labels``: (n, t), right-padded, label -100 where nothing is predicted. ``student``: (n, grid * grid, width), row by row.
    ``z``: g(X), where it was computed before (a ``direct`` family); ``images``: uint8 (n, 3, h, h), where it was not. At alpha = 1 neither is needed
    if the teacher is ``blind``, and CLIP is not run. Logits are formed only from the first predicted position on: the same loss, without
    those of the image tokens. ``count``: see :func:`token_loss`.
    """
    family = teacher.family
    first = int((labels != -100).any(0).nonzero()[0])
    keep = torch.arange(max(first - 1, 0), ids.shape[1], device=ids.device)
    asked: dict[str, Any] = {"attention_mask": mask, "logits_to_keep": keep, "use_cache": False}
    asked |= marks(family.types, ids, labels, teacher.image_token)
    if teacher.blind and (alpha == 1 or (z is not None and family.direct)):
        packed = family.pack(student, teacher.config, teacher.place)
        mixed = packed if alpha == 1 or z is None else blend(z, packed, alpha)  # eq. (2)
        if teacher.takes_features:
            encoded, more = _encoded(teacher, mixed)
            asked |= {"input_ids": ids, "mm_encoder_outputs": {"image": encoded}, **more}
        else:
            asked["inputs_embeds"] = teacher.embeddings(ids, mixed)
        logits = teacher.model(**asked).logits
    else:
        if images is None:
            raise ValueError("lm_loss: alpha != 1 needs the features of CLIP, or the pictures")
        with blended(teacher, alpha, student):
            logits = teacher.model(input_ids=ids, **teacher.pictures(images), **asked).logits
    return token_loss(logits, labels[:, keep], count)


def _encoded(teacher: LlavaTeacher, z: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """W Z_v (eq. 1) in the form in which the model hands its own image features on, and what else it asks for then."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    h, family = teacher.projector(z), teacher.family
    if family.finish is not None:
        each, more = family.finish(teacher.model, h, teacher.config, teacher.place)
        return BaseModelOutputWithPooling(pooler_output=each), more
    return BaseModelOutputWithPooling(pooler_output=list(h) if family.listed else h), {}
