"""What the server owns beside the model: public images, unlabelled or balanced and labelled, and the frozen teacher's outputs.

Only what the method ``needs`` is made. Whatever is made is compared with the test images before a run starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation
from mllm_fl.data.glyphs import glyph_set
from mllm_fl.data.images import ImageSet
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.clip import TeacherConfig, load_teacher
from mllm_fl.models.teacher.logits import teacher_logits
from mllm_fl.seeds import stream

NEIGHBOUR = {"cifar10": "cifar100", "cifar100": "cifar10", "digits": "glyphs"}
"""The unlabelled set that "auto" takes: FedDF's commands and FEDIC use CIFAR-100 for CIFAR-10; for CIFAR-100 we take CIFAR-10."""


@dataclass(frozen=True)
class ServerConfig:
    """``[federate.server]``: the server's images, for methods that need them (FedDF, FedBE; ratio loss).

    ``unlabelled``: "auto" (CIFAR-100 for CIFAR-10 and the reverse, glyphs for digits), "glyphs", "leftover" (training images that no client
    holds, without their labels), or any source of [data]; its training images are taken. ``unlabelled_images``: how many, drawn without replacement;
    absent means all. ``labelled``: a source of [align], balanced, ``labelled_per_class`` images a class.
    """

    unlabelled: str = "auto"
    unlabelled_images: int | None = 5000
    labelled: str = "leftover"
    labelled_per_class: int = 32
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("unlabelled_images", "labelled_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"federate.server.{name}", f"{value} is below 1")


def unlabelled_images(config: ServerConfig, data: DataConfig, federation: Federation) -> ImageSet:
    """The server's unlabelled images at the clients' size and normalisation; labels are -1.

    Raises:
        UserError: "auto" has no answer for this data set, an unknown source, or fewer images than asked for.
    """
    place = "federate.server.unlabelled"
    name = config.unlabelled
    if name == "auto":
        name = NEIGHBOUR.get(data.source, "")
        if not name:
            raise UserError(
                place, f"no default for {data.source!r}", "name a source: leftover, folder:PATH, cifar100, ..."
            )
    size = int(federation.test.read([0]).shape[-1])
    if name == "glyphs":
        count = config.unlabelled_images or 5000
        classes = len(federation.class_names)
        images, _ = glyph_set(
            federation.class_names, -(-count // classes), config.seed, image_size=size, purpose="unlabelled"
        )
    elif name == "leftover":
        images = federation.leftover
    else:
        images = load_source(DataConfig(source=name, root=data.root, image_size=size)).train
    if config.unlabelled_images is not None:
        if len(images) < config.unlabelled_images:
            raise UserError(
                "federate.server.unlabelled_images",
                f"{images.name} has {len(images)} images, {config.unlabelled_images} asked for",
            )
        order = torch.randperm(len(images), generator=stream(config.seed, "unlabelled"))[: config.unlabelled_images]
        images = images.subset(order.sort().values.tolist(), f"{images.name}, {config.unlabelled_images} images")
    return replace(
        images, labels=np.full(len(images), -1, dtype=np.int64), mean=federation.train.mean, std=federation.train.std
    )


def clients_logits(config: TeacherConfig, federation: Federation, cache: Path) -> dict[int, Tensor]:
    """Each client's rows (n_k, C) of the teacher's zero-shot logits on its images, un-augmented; computed once and kept in ``cache``.

    In a simulation one process plays all clients; on real devices each computes or is given its own.
    """
    if federation.manifest.partition == "virtual":
        problem = "needs the teacher's logits at each client, which are kept in a list of clients"
        raise UserError("federate.algorithm", problem, "use another data.partition than virtual")
    logits = teacher_logits(load_teacher(config), federation.subset, federation.class_names, cache)
    row = {image: i for i, image in enumerate(sorted(i for held in federation.clients for i in held))}
    return {k: logits[[row[i] for i in held]] for k, held in enumerate(federation.clients) if held}
