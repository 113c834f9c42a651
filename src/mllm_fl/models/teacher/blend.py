"""Dynamic weighted pretraining inside a frozen LLaVA: Z_v = (1 - alpha) g(X) + alpha g_fl(X) (arXiv:2409.06067, eq. 2).

Two forms of the same sum. ``blended`` hooks the projector's input and leaves the rest of the model as it is: the reference.
``lm_loss`` computes the same loss from features g(X) that were computed before, or from none when alpha = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mllm_fl.errors import UserError
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
    """Inside, the projector of ``teacher`` sees the blend of its own input and ``student`` (n, grid * grid, width)."""

    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (blend(args[0], student, alpha), *args[1:])

    handle = teacher.projector.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def lm_loss(
    teacher: LlavaTeacher, ids: Tensor, mask: Tensor, labels: Tensor, student: Tensor, alpha: float, z: Tensor | None
) -> Tensor:
    """LLaVA's language-modelling loss with eq. (2) at the projector's input. Shape ().

    ``ids``, ``mask``, ``labels``: (n, t), right-padded, label -100 where nothing is predicted. ``z``: g(X), not needed at alpha = 1.
    Logits are formed only from the first predicted position on: the same loss, without those of the image tokens.
    """
    if alpha != 1 and z is None:
        raise ValueError("lm_loss: alpha != 1 needs the features of CLIP")
    mixed = student if z is None else blend(z, student, alpha)  # eq. (2)
    first = int((labels != -100).any(0).nonzero()[0])
    keep = torch.arange(max(first - 1, 0), ids.shape[1])
    out = teacher.model(
        inputs_embeds=teacher.embeddings(ids, mixed),
        attention_mask=mask,
        labels=labels[:, keep],
        logits_to_keep=keep,
        use_cache=False,
    )
    loss: Tensor = out.loss
    return loss
