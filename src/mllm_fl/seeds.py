"""Named random streams. Nothing in this library draws from, or seeds, a global generator.

A stream is named by (run seed, purpose, keys...), for example ``(7, "shuffle", round, client)``. Its seed, 63 bits of a SHA-256 over
those names, is the same whichever process, worker or order asks for it. Two names give unrelated draws, but not with certainty: torch's
generator on the CPU is a Mersenne twister that takes only the low 32 bits of its seed, so two given names give one and the same stream
with probability 2**-32, and among n streams some pair does with probability of about n**2 / 2**33 (one in a hundred for 10,000 streams, and
then two of the clients' rounds shuffle alike). NumPy's generator takes all 63 bits.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from mllm_fl.errors import UserError

RESERVED = frozenset(("shuffle", "augment", "align", "sampling", "init", "pretrain-order", "d_align", "unlabelled"))
"""Purposes that engines and stages draw for themselves."""


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


def method_stream(run: int, purpose: str, *keys: int | str) -> torch.Generator:
    """The named stream for a hook of an algorithm; the draws are those of :func:`stream`.

    Raises:
        UserError: a purpose of the engine's own: the hook would repeat the draws that order and augment its client's batches.
    """
    if purpose in RESERVED:
        raise UserError(
            f"stream {purpose!r}",
            "is drawn from by the engine itself, so a method that drew from it would repeat its numbers",
            "name it by what the method draws, for example 'mixup'",
        )
    return stream(run, purpose, *keys)
