"""The state of the process's global random generators, to be compared and put back: the one place that looks at them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def snapshot() -> dict[str, Any]:
    """The state of each global generator, by the name of its library."""
    return {"torch": torch.random.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}


def put_back(state: dict[str, Any]) -> None:
    """Undo whatever was drawn or seeded since."""
    torch.random.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["random"])


def used(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The libraries whose global generator differs between two snapshots."""
    return [name for name in a if not _equal(a[name], b[name])]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return a == b
