"""The federation's schedule: ``[federate]``, and who is online when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mllm_fl.algorithms import find
from mllm_fl.algorithms.base import Algorithm, FedAvg
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream
from mllm_fl.stages.server import ServerConfig


@dataclass(frozen=True)
class FederateConfig:
    """``[federate]``: the federation's schedule. ``[federate.method]`` holds the algorithm's own fields.

    ``sampling``: "creff" draws the online clients from one legacy NumPy stream seeded with the data seed, as CReFF's code
    does; "uniform" from the named stream (run, "sampling", round). Evaluated every ``evaluate_every`` rounds and in each of the
    last ``evaluate_last``; ``report_last``: the last rounds whose evaluated ones make the mean that a run is quoted with.
    ``limit``: an update with a value beyond it in magnitude is dropped.
    ``validation_per_class``: held-out server images of every class by which a round is chosen (stages/validation.py); absent: none.
    """

    algorithm: str = "fedavg"
    rounds: int = 200
    clients_per_round: int = 8
    sampling: Literal["creff", "uniform"] = "creff"
    evaluate_every: int = 1
    evaluate_last: int = 10
    report_last: int = 20
    checkpoint_every: int = 1
    limit: float = 1e6
    validation_per_class: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    method: Algorithm = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        for name in ("rounds", "clients_per_round", "evaluate_every", "checkpoint_every", "report_last"):
            if getattr(self, name) < 1:
                raise UserError(f"federate.{name}", f"{getattr(self, name)} is below 1")
        if self.validation_per_class is not None and self.validation_per_class < 1:
            raise UserError("federate.validation_per_class", f"{self.validation_per_class} is below 1", "leave it out")
        if not isinstance(self.method, find(self.algorithm)):
            raise UserError(
                "federate.method", f"holds a {type(self.method).__name__}, but federate.algorithm is {self.algorithm!r}"
            )


def online_clients(config: FederateConfig, clients: int, data_seed: int, seed: int) -> Iterator[list[int]]:
    """The clients of round 1, 2, ..., each a sorted list of ``clients_per_round`` distinct clients."""
    legacy = np.random.RandomState(data_seed)
    for t in itertools.count(1):
        if config.sampling == "creff":
            chosen = legacy.choice(clients, config.clients_per_round, replace=False)
        else:
            chosen = numpy_stream(seed, "sampling", t).choice(clients, config.clients_per_round, replace=False)
        yield sorted(int(k) for k in chosen)
