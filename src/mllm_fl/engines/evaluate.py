"""The one evaluator: test images through the deployed weights, un-augmented, in evaluation mode."""

from __future__ import annotations

import torch

from mllm_fl.algorithms.base import Task
from mllm_fl.data.images import ImageSet
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree

BATCH = (
    100  # images a pass; 500 take up to twice the time (their activations leave the cache) and five times the memory
)


@torch.no_grad()
def evaluate(task: Task, w: Tree, images: ImageSet, start: int = 0, stop: int | None = None) -> Evaluation:
    """What the model ``w`` does on ``images``: confusion matrix and calibration; ``w`` is not changed.

    ``start``, ``stop``: only these positions. Parts that begin at multiples of ``BATCH`` see the same batches as the whole,
    and their sum is the whole, exactly.
    """
    total = Evaluation.none(len(task.class_names))
    labels = torch.from_numpy(images.labels)
    for batch in torch.split(torch.arange(start, len(images) if stop is None else stop), BATCH):
        logits = task.forward(w, images.normalised(batch.tolist()), train=False)[1]
        total = total + Evaluation.of(labels[batch], logits)
    return total
