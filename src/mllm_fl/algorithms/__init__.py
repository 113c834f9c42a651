"""Every method by name; one file each. A method of the user's own is named ``my_module:MyMethod``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from mllm_fl.algorithms.base import Algorithm
from mllm_fl.errors import UserError

METHODS = {
    "fedavg": "mllm_fl.algorithms.base:FedAvg",
    "fedavgm": "mllm_fl.algorithms.fedavgm:FedAvgM",
    "fedprox": "mllm_fl.algorithms.fedprox:FedProx",
    "fednova": "mllm_fl.algorithms.fednova:FedNova",
    "feddf": "mllm_fl.algorithms.feddf:FedDF",
    "fedbe": "mllm_fl.algorithms.fedbe:FedBE",
    "ccvr": "mllm_fl.algorithms.ccvr:CCVR",
    "fedfocal": "mllm_fl.algorithms.fedfocal:FedFocal",
    "ratioloss": "mllm_fl.algorithms.ratioloss:RatioLoss",
    "taunorm": "mllm_fl.algorithms.taunorm:TauNorm",
    "creff": "mllm_fl.algorithms.creff:CReFF",
    "clip2fl": "mllm_fl.algorithms.clip2fl:CLIP2FL",
    "scaffold": "mllm_fl.algorithms.scaffold:Scaffold",
    "logitadjust": "mllm_fl.algorithms.logitadjust:LogitAdjust",
    "balancedsoftmax": "mllm_fl.algorithms.balancedsoftmax:BalancedSoftmax",
    "fedyoyo": "mllm_fl.algorithms.fedyoyo:FedYoYo",
}


def find(name: str, place: str = "federate.algorithm") -> type[Algorithm]:
    """The class behind a method's name, or behind ``module:Class``.

    Raises:
        UserError: unknown name (with the nearest known ones), module or class missing, or not an Algorithm.
    """
    target = METHODS.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}, or my_module:MyMethod"
        raise UserError(place, f"unknown method {name!r}", hint)
    module, _, cls_name = target.partition(":")
    if os.getcwd() not in sys.path:  # a user's module lies beside the configuration
        sys.path.insert(0, os.getcwd())
    try:
        cls = getattr(importlib.import_module(module), cls_name, None)
    except ModuleNotFoundError as e:
        raise UserError(
            place, f"no module {e.name!r} for {name!r}", "run where the module lies, or set PYTHONPATH"
        ) from e
    except Exception as e:
        raise UserError(place, f"importing {module!r} failed: {type(e).__name__}: {e}", "mend the module") from e
    if cls is None:
        raise UserError(place, f"module {module!r} has no {cls_name!r}")
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise UserError(place, f"{name!r} is not a subclass of mllm_fl.algorithms.base.Algorithm")
    return cls
