"""Named random streams. Nothing in this library draws from, or seeds, a global generator.

A stream is named by (run seed, purpose, keys...), for example ``(7, "shuffle", round, client)``.
Its seed is the first eight bytes of a SHA-256 over those names, so that two streams never share
draws, whichever process, worker or order asks for them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_of(run: int, purpose: str, *keys: int | str) -> int:
    """Seed of the named stream, a non-negative integer below 2**63."""
    name = "\x1f".join([str(run), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def stream(run: int, purpose: str, *keys: int | str) -> torch.Generator:
    """The named stream as a CPU ``torch.Generator``."""
    return torch.Generator().manual_seed(seed_of(run, purpose, *keys))


def numpy_stream(run: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """The named stream as a NumPy ``Generator`` (PCG64)."""
    return np.random.default_rng(seed_of(run, purpose, *keys))
