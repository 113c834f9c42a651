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


class Lessons:
    """``steps`` batches of the server's images with the ensemble's targets on them.

    ``combine`` turns the teachers' logits (m, n, C) into targets (n, C). Each image that a batch uses passes each teacher once,
    in evaluation mode, un-augmented.
    """

    def __init__(
        self, task: Task, images: ImageSet, teachers: Sequence[Tree], combine: Callable[[Tensor], Tensor],
        steps: int, batch_size: int, generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.task, self.images = task, images
        self.order = batches(len(images), batch_size, steps, generator)
        self.used = torch.cat(self.order).unique() if steps else torch.zeros(0, dtype=torch.int64)
        rows = []
        with torch.no_grad():
            for part in self.used.split(500):
                x = images.normalised(part.tolist())
                rows.append(combine(torch.stack([task.forward(w, x, train=False)[1] for w in teachers])))
        self.targets = torch.cat(rows) if rows else torch.zeros(0, len(task.class_names))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (b, 3, h, w), normalised, and targets (b, C) of one step."""
        batch = self.order[step]
        return self.images.normalised(batch.tolist()), self.targets[torch.searchsorted(self.used, batch)]
