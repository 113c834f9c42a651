"""How clients are executed: the ``[federate.engine]`` table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm_fl.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """``[federate.engine]``: where and how a round's clients are trained; it changes no algorithm.

    ``name``: "serial" (one client after another, the reference), "parallel" (a worker process per core; the same bits), "batched" (all
    clients of a round as one tensor program, for a GPU), or "auto": parallel where the work is worth starting processes, else serial.
    "flower" is what `mllm-fl deploy` runs on other machines, "flower-sim" is Flower's own simulation on this one (the same bits; extra flower-sim).
    ``workers``: of the parallel engine; absent means all usable cores, shared between the runs of ``--jobs``. More than four a core
    are not started (the event "fewer workers" says so): their number changes no result.
    ``precision``: "fp32", or "bf16" for forward and backward passes under autocast (weights and sums stay float32). ``layout``: how
    images lie in memory. "auto" is what a short probe of this chip found fastest (fp32 and nchw for the batched engine); a run's
    env.json records what was chosen, and resuming keeps it. ``device``: of the batched engine, which alone can use a GPU;
    "auto" takes CUDA where there is one. There precision "tf32" rounds the factors of float32 products to 10 bits (on a CPU it is fp32).
    """

    name: Literal["auto", "parallel", "serial", "batched", "flower", "flower-sim"] = "auto"
    workers: int | None = None
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    layout: Literal["auto", "nchw", "channels_last"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for key, known in (
            ("name", ("auto", "parallel", "serial", "batched", "flower", "flower-sim")),
            ("precision", ("auto", "fp32", "tf32", "bf16")),
            ("layout", ("auto", "nchw", "channels_last")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, key) not in known:
                raise UserError(
                    f"federate.engine.{key}", f"{getattr(self, key)!r} is unknown", f"use {' or '.join(known)}"
                )
        if self.device == "cuda" and self.name != "batched":
            raise UserError("federate.engine.device", f"'cuda' with the {self.name} engine", 'set name = "batched"')
        if self.workers is not None and self.workers < 1:
            raise UserError("federate.engine.workers", f"{self.workers} is below 1")
