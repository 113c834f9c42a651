"""D_align, the server's small class-balanced images (MLLM-LLaVA-FL, arXiv:2409.06067, §3.3: "a small, class-balanced dataset"), by name of its source.

The paper suggests to collect or to generate such images, and does not say which it took. Images of the training set that no client holds are the easiest
to have in an experiment, and in-domain: they tell more about the rare classes than all clients together. So every run records how many there are, whence,
and whether they are in-domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.config import DataConfig
from mllm_fl.data.decode import EncodedPixels, FileContents
from mllm_fl.data.federation import Federation
from mllm_fl.data.folder import all_images, image_files
from mllm_fl.data.glyphs import glyph_set
from mllm_fl.data.hub import load_hub
from mllm_fl.data.imagenet_lt import load_list
from mllm_fl.data.images import ImageSet, Joined
from mllm_fl.data.longtail import achieved_imbalance
from mllm_fl.data.manifest import fingerprint, sha256_of
from mllm_fl.errors import UserError
from mllm_fl.seeds import stream
from mllm_fl.stages.align import AlignConfig, Aligner, ZeroShot

IMAGES = 1000
"""Alignment images in all, where ``per_class`` does not say."""


def alignment_set(
    config: AlignConfig, federation: Federation, data: DataConfig, teacher: ZeroShot | None = None
) -> ImageSet:
    """D_align: class-balanced server images from the source that [align] names, at the size and normalisation of the clients' images.

    ``teacher``: CLIP's zero-shot logits of a set of images, asked by the source "open:" only.

    Raises:
        UserError: an unknown source, a class that is missing or has too few images, nothing left over.
    """
    names, side = federation.class_names, int(federation.test.read([0]).shape[-1])
    per_class = config.per_class or max(1, IMAGES // len(names))
    draws = stream(config.seed, "d_align")
    if config.source == "leftover":
        return leftovers(federation, per_class, draws)
    if config.source == "glyphs":
        images, _ = glyph_set(names, per_class, config.seed, image_size=side, purpose="d_align")
    elif config.source == "val":
        if data.source != "imagenet-lt":
            raise UserError(
                "align.source",
                f"'val' is ImageNet-LT's validation list, but data.source is {data.source!r}",
                "use leftover or folder:PATH",
            )
        images = in_order_of(names, load_list(data.root, "val", side))
        per_class = config.per_class or min(images.class_counts())
    elif config.source.startswith("folder:"):
        images = in_order_of(names, all_images(config.source.removeprefix("folder:"), side))
    elif config.source.startswith("hf:"):
        images = in_order_of(names, load_hub(config.source.removeprefix("hf:"), side)[0])
    elif config.source.startswith("open:"):
        if teacher is None:
            raise UserError(
                "align.source", f"{config.source!r} needs a teacher to look at the images", "give [teacher]"
            )
        images = collected(config.source.removeprefix("open:"), names, per_class, side, teacher)
    else:
        problem = f"unknown source {config.source!r}"
        raise UserError("align.source", problem, "use glyphs, leftover, val, folder:PATH, hf:NAME or open:PATH")
    images = replace(images, mean=federation.train.mean, std=federation.train.std)
    made = config.source == "glyphs" or config.source.startswith("open:")
    return images if made else balanced(images, per_class, draws)


def in_domain(config: AlignConfig) -> bool | None:
    """Whether D_align is of the clients' own distribution: as [align] says, else what follows from the source; None is unknown."""
    if config.in_domain is not None:
        return config.in_domain
    return {"leftover": True, "val": True, "glyphs": False}.get(
        config.source, False if config.source.startswith("open:") else None
    )


def record(config: AlignConfig, images: ImageSet, aligner: Aligner | None) -> dict[str, Any]:
    """What final.json and every table say about D_align: source, size, whether it is in-domain, the control, the teacher's accuracy on it."""
    return {
        "source": images.name, "images": len(images), "per_class": len(images) // len(images.class_names),
        "in_domain": in_domain(config), "control": config.control, "zero_shot": None if aligner is None else aligner.zero_shot,
    }  # fmt: skip


def dealt(federation: Federation, images: ImageSet) -> Federation:
    """The federation whose clients hold ``images`` too, dealt one by one: the same labelled images without an alignment.

    Raises:
        UserError: clients that nobody lists.
    """
    old = federation.manifest
    if old.partition == "virtual":
        raise UserError("align.control", "virtual clients cannot be dealt images", "use another data.partition")
    n, k = len(federation.train), len(old.clients)
    train = replace(
        federation.train, name=f"{federation.train.name} and {images.name}",
        pixels=Joined((federation.train.pixels, images.pixels)), labels=np.concatenate([federation.train.labels, images.labels]),
    )  # fmt: skip
    counts = tuple(a + b for a, b in zip(old.class_counts, images.class_counts(), strict=True))
    manifest = replace(
        old, dataset=train.name, images=len(train), fingerprint=fingerprint(train), class_counts=counts,
        achieved_imbalance=achieved_imbalance(counts), subset_sha256=sha256_of([old.subset_sha256, pixel_hashes(images)]),
        clients=tuple((*held, *range(n + i, n + len(images), k)) for i, held in enumerate(old.clients)),
    )  # fmt: skip
    spare = (
        tuple(federation.spare) if federation.spare is not None else tuple(np.flatnonzero(~federation.held).tolist())
    )
    return Federation(train, federation.test, manifest, spare)


def collected(path: str, class_names: Sequence[str], per_class: int, side: int, teacher: ZeroShot) -> ImageSet:
    """The ``per_class`` open images that CLIP takes for each class with the highest probability, each for the class that it is likest.

    Their labels are the teacher's. ``path``: a corpus, or any folder of images; each is decoded to ``side`` pixels.

    Raises:
        UserError: no images, an image that cannot be read, or a class that too few images are likest to.
    """
    folder = Path(path).expanduser()
    files = tuple(image_files(folder)) if folder.is_dir() else ()
    if not files:
        raise UserError(f"align.source: open:{path}", "holds no image", "give a corpus or a folder of images")
    pixels = EncodedPixels(FileContents(files), side)
    everything = ImageSet(folder.name, pixels, np.full(len(files), -1, dtype=np.int64), tuple(class_names))
    p, likest = teacher(everything).softmax(1).max(1)
    chosen: list[int] = []
    for c, name in enumerate(class_names):
        mine = torch.nonzero(likest == c).flatten()
        if len(mine) < per_class:
            problem = f"{len(mine)} of {len(files)} images in {folder} are likest to {name!r}, {per_class} asked for"
            raise UserError("align.per_class", problem, "ask for fewer, or give more open images")
        chosen += mine[p[mine].argsort(descending=True, stable=True)[:per_class]].tolist()
    labels = likest.numpy()[chosen].astype(np.int64)
    name = f"{folder.name}, collected by the teacher, {per_class} a class"
    return replace(everything.subset(chosen, name), labels=labels)


def in_order_of(class_names: Sequence[str], images: ImageSet) -> ImageSet:
    """The images of these classes, labelled in their order; a folder's own classes are sorted by name.

    Raises:
        UserError: a class is missing.
    """
    missing = [n for n in class_names if n not in images.class_names]
    if missing:
        raise UserError("align.source", f"{images.name} has no class {missing[0]!r}", "one folder a class, same names")
    number = np.full(len(images.class_names), -1)
    number[[images.class_names.index(n) for n in class_names]] = np.arange(len(class_names))
    kept = images.subset(np.flatnonzero(number[images.labels] >= 0).tolist())
    return replace(kept, labels=number[kept.labels], class_names=tuple(class_names))


def balanced(images: ImageSet, per_class: int, generator: torch.Generator) -> ImageSet:
    """``per_class`` images of every class, drawn without replacement.

    Raises:
        UserError: a class has fewer; names it and both numbers.
    """
    labels = torch.from_numpy(images.labels)
    chosen: list[int] = []
    for c, name in enumerate(images.class_names):
        mine = torch.nonzero(labels == c).flatten()
        if len(mine) < per_class:
            raise UserError(
                "align.per_class",
                f"class {name!r} has {len(mine)} images in {images.name}, {per_class} asked for",
                f"set align.per_class to {min(images.class_counts())} or fewer"
                if min(images.class_counts())
                else "add some",
            )
        chosen += mine[torch.randperm(len(mine), generator=generator)[:per_class]].tolist()
    return images.subset(chosen, f"{images.name}, {per_class} a class")


def leftovers(federation: Federation, per_class: int, generator: torch.Generator) -> ImageSet:
    """``per_class`` training images of every class that no client holds.

    CReFF's long tail keeps the largest class whole, so that class has none left: what is missing is drawn from the images
    that clients hold too, and the set's name says how many. The paper does not say where its images come from.

    Raises:
        UserError: nothing is left over, because the clients hold every training image.
    """
    candidates, held_too = [], 0
    held = torch.from_numpy(federation.held)
    labels = torch.from_numpy(federation.train.labels)
    spare = torch.zeros_like(held)
    spare[list(federation.spare) if federation.spare is not None else ~held] = True
    if not bool(spare.any()):
        raise UserError(
            "align.source",
            f"no image is left over: the clients hold all {int(held.sum())} that are at hand",
            "cut a long tail (data.imbalance_factor), or use glyphs, val or folder:PATH",
        )
    for c in range(len(federation.class_names)):
        free, rest = (torch.nonzero((labels == c) & m).flatten() for m in (spare, held))
        short = max(0, per_class - len(free))
        candidates += free.tolist() + rest[torch.randperm(len(rest), generator=generator)[:short]].tolist()
        held_too += min(short, len(rest))
    name = f"{federation.train.name} leftover" + (f" ({held_too} of them also at clients)" if held_too else "")
    return balanced(federation.train.subset(candidates, name), per_class, generator)
