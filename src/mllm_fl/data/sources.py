"""Data sets by name: from the ``[data]`` table to a training and a test set."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from mllm_fl.data.config import DataConfig
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

NAMED = ("digits", "cifar10", "cifar100", "imagenet-lt")
PREFIXED = ("folder:", "hf:", "pack:")


class Splits(NamedTuple):
    """The two sets that every source must offer."""

    train: ImageSet
    test: ImageSet


def load_source(config: DataConfig) -> Splits:
    """The training and test images that ``config.source`` names. Labels are read now, pixels mostly when first asked for."""
    source, root, size = config.source, config.root, config.image_size
    kind, colon, rest = source.partition(":")
    if colon and not rest:
        raise UserError(
            "data.source", f"{source!r} names no place", f"write {kind}:PATH" if kind != "hf" else "write hf:NAME"
        )
    if source == "digits":
        from mllm_fl.data.digits import load_digits

        return Splits(*load_digits(size or 16))
    if source in ("cifar10", "cifar100"):
        from mllm_fl.data.cifar import load_cifar

        return Splits(*load_cifar(source, root, size or 32))
    if source == "imagenet-lt":
        from mllm_fl.data.imagenet_lt import load_imagenet_lt

        return Splits(*load_imagenet_lt(root, size or 224))
    if kind == "folder":
        from mllm_fl.data.folder import load_folder

        return Splits(*load_folder(rest, size or 32))
    if kind == "hf":
        from mllm_fl.data.hub import load_hub

        return Splits(*load_hub(rest, size or 32))
    if kind == "pack":
        from mllm_fl.data.pack import load_pack

        packed = load_pack(rest, size)
        return Splits(packed.train, packed.test)
    near = difflib.get_close_matches(source, NAMED, 1)
    choices = ", ".join([*NAMED, "folder:PATH", "hf:NAME", "pack:PATH"])
    raise UserError(
        "data.source", f"unknown data set {source!r}", f"did you mean {near[0]!r}?" if near else f"use one of {choices}"
    )
