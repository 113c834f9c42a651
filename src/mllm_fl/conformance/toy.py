"""A federation of random coloured images and a network of two hundred numbers: all that a method may need, in milliseconds.

Every entry of ``needs`` has its toy: server images, labelled or not, a frozen teacher's logits on each client's images, and its
text embeddings. Nothing here is real; it is built so that mistakes show, not so that a method looks good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_fl.algorithms.base import Shard, Task
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.seeds import numpy_stream, stream
from mllm_fl.trees import Tree, clone

SIZE = 8  # pixels a side
WIDTH = 6  # channels of the feature, and the length of a text embedding


def images(per_class: int, classes: int = 3, size: int = SIZE, seed: int = 0, name: str = "toy") -> ImageSet:
    """Class c is bright in channel c % 3, plus noise: learnable within a few steps."""
    labels = np.repeat(np.arange(classes), per_class).astype(np.int64)
    return painted(labels, classes, size, seed, name)


def painted(labels: np.ndarray, classes: int, size: int = SIZE, seed: int = 0, name: str = "toy") -> ImageSet:
    """One image for each label, of class ``labels[i]`` out of ``classes``; pixels are a function of the arguments."""
    rng = numpy_stream(seed, "toy images", name, size)
    x = rng.integers(0, 120, (len(labels), 3, size, size))
    x[np.arange(len(labels)), labels % 3] += 90
    return ImageSet(
        name,
        MemoryPixels(torch.from_numpy(x.astype(np.uint8))),
        labels.astype(np.int64),
        tuple(f"class {c}" for c in range(classes)),
    )


class Backbone(nn.Module):
    """conv3x3 (stride 2) - BatchNorm - ReLU: images (n, 3, h, w) -> map (n, 6, h/2, w/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class TinyNet(nn.Module):
    """Images -> (feature (n, 6), logits (n, C)): what a real network has, down to BatchNorm's integer counter.

    ``idle`` adds a parameter that no loss reaches, as frozen or unused parts of larger networks have.
    """

    def __init__(self, classes: int, idle: bool = False) -> None:
        super().__init__()
        if idle:
            self.idle = nn.Parameter(torch.ones(2))
        self.backbone = Backbone()
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.backbone(x).mean((2, 3))
        return feature, self.classifier(feature)


def tiny_net(classes: int, idle: bool = False) -> TinyNet:
    """A freshly initialised :class:`TinyNet`, always the same; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyNet(classes, idle)


@dataclass(frozen=True)
class World:
    """A task, its initial weights, who holds which images, and the test images that no method may see."""

    task: Task
    w: Tree
    clients: tuple[ImageSet, ...]
    test: ImageSet

    def shard(self, client: int, round: int, needs: Sequence[str] = ()) -> Shard:
        """The client's images as it sees them in a round, with the teacher's logits where a method needs them."""
        held = self.clients[client]
        teacher = teacher_logits(held) if "teacher" in needs else None
        return Shard(client, round, held, self.task.seed, teacher)

    def holding(self, clients: Sequence[ImageSet]) -> World:
        """The same world with other clients."""
        return replace(
            self, clients=tuple(clients), task=replace(self.task, population=tuple(len(held) for held in clients))
        )


def world(
    needs: Sequence[str] = (),
    *,
    classes: int = 3,
    sizes: Sequence[int] = (16, 11, 7),
    idle: bool = False,
    seed: int = 0,
) -> World:
    """Clients with ``sizes`` images, each leaning towards another class, and the server's resources for ``needs``."""
    rng = numpy_stream(seed, "toy clients", classes)
    clients = []
    for k, n in enumerate(sizes):
        labels = np.where(rng.random(n) < 0.5, k % classes, rng.integers(0, classes, n))
        clients.append(painted(np.sort(labels), classes, seed=seed, name=f"toy/client {k}"))
    net = tiny_net(classes, idle)
    few = 4 if classes < 100 else 1
    unlabelled = replace(images(few, min(classes, 6), seed=seed, name="toy/unlabelled"), class_names=())
    task = Task(
        net=net,
        class_names=tuple(f"class {c}" for c in range(classes)),
        population=tuple(sizes),
        seed=seed,
        unlabelled=replace(unlabelled, labels=np.full(len(unlabelled), -1, dtype=np.int64))
        if "unlabelled" in needs
        else None,
        labelled=images(few, classes, seed=seed, name="toy/labelled") if "labelled" in needs else None,
        texts=text_embeddings(classes) if "texts" in needs else None,
    )
    return World(task, clone(net.state_dict()), tuple(clients), images(2, min(classes, 6), seed=seed, name="toy/test"))


def teacher_logits(held: ImageSet) -> Tensor:
    """A frozen teacher: right about most images, unsure in the manner of CLIP's logits. Float32, (n, C)."""
    n, classes = len(held), len(held.class_names)
    logits = torch.from_numpy(numpy_stream(0, "toy teacher", held.name).normal(0, 1, (n, classes))).float()
    logits[torch.arange(n), torch.from_numpy(held.labels)] += 2
    return logits


def text_embeddings(classes: int) -> Tensor:
    """One unit vector a class: float32, (C, 6)."""
    return F.normalize(torch.randn(classes, WIDTH, generator=stream(0, "toy texts", classes)), dim=1)
