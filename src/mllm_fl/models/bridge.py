"""torchvision beside a torch build that its compiled operators were not made for.

The package index has torchvision only as a build against CUDA. Beside a CPU-only torch its operators do not load, and then
``import torchvision`` stops at the first operator that it describes, and with it every import that needs torchvision
(transformers' image processors, timm). Nothing here uses those operators, so their absence is bridged by declaring the two
that the import asks for. Where torchvision is absent, or fits, nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

_declared: list[Any] = []


def bridge_torchvision() -> None:
    """Make ``import torchvision`` work if it is installed; call before importing what imports it."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::nms" not in str(e) or _declared:
            raise
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
