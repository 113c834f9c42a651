"""What methods have in common that distil an ensemble into the global model on the server's unlabelled images (FedDF, FedBE). Not a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Task
from mllm_fl.data.images import ImageSet
from mllm_fl.descent import batches
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree


def unlabelled(task: Task, method: str) -> ImageSet:
    """The server's unlabelled images.

    Raises:
        UserError: there are none.
    """
    if task.unlabelled is None or len(task.unlabelled) == 0:
        raise UserError(
            "federate.server.unlabelled",
            f"{method} needs unlabelled images on the server",
            "name a source, e.g. 'cifar100'",
        )
    return task.unlabelled


def lessons(
    task: Task, images: ImageSet, teachers: Sequence[Tree], combine: Callable[[Tensor], Tensor],
    steps: int, batch_size: int, generator: torch.Generator,
) -> Callable[[int], tuple[Tensor, Tensor]]:  # fmt: skip
    """``steps`` batches of the server's images with the ensemble's targets on them.

    Returns a function of the step: images (b, 3, h, w), normalised, and targets (b, C). ``combine`` turns the teachers' logits (m, n, C)
    into targets (n, C). Each image that a batch uses passes each teacher once, in evaluation mode, un-augmented.
    """
    order = batches(len(images), batch_size, steps, generator)
    used = torch.cat(order).unique()
    rows = []
    with torch.no_grad():
        for part in used.split(500):
            x = images.normalised(part.tolist())
            rows.append(combine(torch.stack([task.forward(w, x, train=False)[1] for w in teachers])))
    targets = torch.cat(rows)

    def lesson(step: int) -> tuple[Tensor, Tensor]:
        batch = order[step]
        return images.normalised(batch.tolist()), targets[torch.searchsorted(used, batch)]

    return lesson
