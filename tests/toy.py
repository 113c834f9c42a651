"""A tiny federation of random coloured images, in memory: enough to train, small enough for hundreds of tests."""

from __future__ import annotations

import numpy as np
import torch

from mllm_fl.algorithms.base import Task
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation, make_manifest
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.trees import Tree, clone


def images(per_class: int, classes: int = 3, size: int = 8, seed: int = 0, name: str = "toy") -> ImageSet:
    """Class c is bright in channel c, plus noise: learnable within a few steps."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class).astype(np.int64)
    x = rng.integers(0, 120, (len(labels), 3, size, size))
    x[np.arange(len(labels)), labels % 3] += 90
    return ImageSet(
        name, MemoryPixels(torch.from_numpy(x.astype(np.uint8))), labels, tuple(f"class {c}" for c in range(classes))
    )


def federation(
    per_class: int = 20, clients: int = 4, classes: int = 3, partition: str = "iid", imbalance: float = 1
) -> Federation:
    """``clients`` clients over ``classes * per_class`` images and a test set of five a class."""
    train = images(per_class, classes, name="toy/train")
    config = DataConfig(partition=partition, clients=clients, min_size=1, imbalance_factor=imbalance)  # type: ignore[arg-type]
    return Federation(train, images(5, classes, seed=1, name="toy/test"), make_manifest(config, train))


def task(fed: Federation, seed: int = 0, width: int = 2) -> tuple[Task, Tree]:
    """The task on a ResNet-8 of a few hundred parameters, and its initial weights."""
    net = build_network(ModelConfig(width=width), len(fed.class_names), seed)
    return Task(net, fed.class_names, tuple(map(len, fed.clients)), seed), clone(net.state_dict())
