"""The one evaluator: test images through the deployed weights, un-augmented, in evaluation mode."""

from __future__ import annotations

import torch

from mllm_fl.algorithms.base import Task
from mllm_fl.data.images import ImageSet
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree


@torch.no_grad()
def evaluate(task: Task, w: Tree, images: ImageSet, batch_size: int = 500) -> Evaluation:
    """What the model ``w`` does on ``images``: confusion matrix and calibration; ``w`` is not changed."""
    classes = len(task.class_names)
    total = Evaluation.none(classes)
    labels = torch.from_numpy(images.labels)
    for batch in torch.split(torch.arange(len(images)), batch_size):
        logits = task.forward(w, images.normalised(batch.tolist()), train=False)[1]
        total = total + Evaluation.of(labels[batch], logits)
    return total
