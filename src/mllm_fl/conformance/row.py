"""One method as the suite tries it, and how every method of this package is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm_fl.algorithms import METHODS, find
from mllm_fl.algorithms.base import Algorithm
from mllm_fl.conformance import toy
from mllm_fl.conformance.toy import World

ROWS: dict[
    str, dict[str, Any]
] = {  # name -> fields under which the method differs from FedAvg on the toy, and is quick
    "fedavg": {},
    "fedavgm": {},
    "fedprox": {"mu": 0.5},
    "fednova": {},
    "feddf": {"steps": 3, "batch_size": 8},
    "fedbe": {"steps": 6, "batch_size": 8, "samples": 3, "average_every": 2},
    "ccvr": {"samples": 20, "epochs": 2},
    "fedfocal": {},
    "ratioloss": {"steps": 1},
    "taunorm": {},
    "scaffold": {},
    "logitadjust": {},
    "balancedsoftmax": {},
    "fedyoyo": {"warmup": 2},
    "creff": {"features": 4, "match_steps": 3, "head_epochs": 3, "repeats": 2, "images": 4},
    "clip2fl": {"features": 4, "match_steps": 3, "head_epochs": 3, "repeats": 2, "images": 4},
}


@dataclass(frozen=True)
class Row:
    """A method's row of the suite.

    ``fields``: values under which it must differ from FedAvg, and is quick. ``waives``: names of checks that do not apply,
    with the reason, which is printed. ``build``: makes the toy federation with the server's resources; one that takes its
    server images from elsewhere must keep test images out of them like every other.
    """

    method: type[Algorithm]
    fields: Mapping[str, Any] = field(default_factory=dict)
    waives: Mapping[str, str] = field(default_factory=dict)
    build: Callable[..., World] = toy.world

    @property
    def rich(self) -> Algorithm:
        """The method at the row's values."""
        return self.method(**self.fields)

    @property
    def plain(self) -> Algorithm:
        """The method at its neutral value; its other fields are the row's."""
        return self.method(**{**self.fields, **self.method.neutral})

    def world(self, **options: Any) -> World:
        """The toy federation with all that the method needs; see :func:`mllm_fl.conformance.toy.world`."""
        return self.build(self.method.needs, **options)


def row_of(name: str) -> Row:
    """The row of a method's name or of ``module:Class``.

    A class of your own may carry ``trial`` (the row's fields) and ``waives``.

    Raises:
        UserError: no such method.
    """
    cls = find(name, "check-method")
    known = next((k for k, v in METHODS.items() if v == f"{cls.__module__}:{cls.__qualname__}"), name)
    return Row(cls, ROWS.get(known, getattr(cls, "trial", {})), getattr(cls, "waives", {}))
