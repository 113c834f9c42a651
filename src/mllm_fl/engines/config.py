"""How clients are executed: the ``[federate.engine]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm_fl.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """``[federate.engine]``: where and how a round's clients are trained; it changes no algorithm.

    ``name``: "serial" (one client after another, the reference). ``precision``: "fp32", or "bf16" for forward and backward passes under
    autocast (weights and sums stay float32). ``layout``: how images lie in memory.
    """

    name: Literal["serial"] = "serial"
    precision: Literal["fp32", "bf16"] = "fp32"
    layout: Literal["nchw", "channels_last"] = "nchw"

    def __post_init__(self) -> None:
        for key, known in (("precision", ("fp32", "bf16")), ("layout", ("nchw", "channels_last"))):
            if getattr(self, key) not in known:
                raise UserError(f"federate.engine.{key}", f"{getattr(self, key)!r} is unknown", f"use {' or '.join(known)}")
