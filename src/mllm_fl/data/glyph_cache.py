"""Rendered glyphs on disk: one safetensors file per request, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm_fl.data.glyphs import Scene
from mllm_fl.errors import UserError

VERSION = 1
"""To be raised whenever the same request renders other pixels."""


def key_of(texts: list[str], seed: int, purpose: str = "") -> str:
    """The name of a request: hash of the version, the seed, the stream's purpose and the characters in order."""
    named = f"{seed} {purpose}".rstrip()
    return hashlib.sha256(f"{VERSION} {named} {''.join(texts)}".encode()).hexdigest()[:16]


def load(folder: Path, key: str) -> tuple[Tensor, list[Scene]] | None:
    """Cells (uint8, shape (n, 8, 8)) and scenes of an earlier request; None when absent or unreadable."""
    path = folder / f"glyphs-{key}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            scenes = [Scene(**record) for record in json.loads(file.metadata()["scenes"])]
            return file.get_tensor("cells"), scenes
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None  # a broken cache is rendered again


def save(folder: Path, key: str, cells: Tensor, scenes: list[Scene]) -> None:
    """Write a request's result under a temporary name, flush it to disk, then rename it."""
    path = folder / f"glyphs-{key}.safetensors"
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    records = json.dumps([dict(vars(scene)) for scene in scenes])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"cells": cells.to(torch.uint8).contiguous()}, temporary, {"scenes": records})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(folder, f"glyphs could not be cached ({error})", "name a folder that can be written") from None
