"""Checkpoints: one safetensors file that is either whole or not there.

Tensors and a JSON record go into one file, written under a temporary name, flushed to the disk, then renamed. The
JSON carries the digest of the tensors, so that a damaged file is refused instead of continued.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree, digest

__all__ = ["fit", "load_checkpoint", "save_checkpoint", "write_atomic"]


def save_checkpoint(path: Path, tensors: Tree, record: dict[str, Any]) -> None:
    """Write tensors and record as one file; see :func:`load_checkpoint`."""
    meta = {"record": json.dumps(record, sort_keys=True), "digest": digest(tensors), "format": "mllm-fl checkpoint 1"}
    write_atomic(path, save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata=meta))


AGAIN = "delete it to start this run from its beginning"
GONE = "copy it again, or delete the run folder and run it again"


def load_checkpoint(path: Path, way_out: str = AGAIN) -> tuple[Tree, dict[str, Any]]:
    """The tensors and the record of a checkpoint; ``way_out``: what to do about a damaged one.

    Raises:
        UserError: no such file, truncated, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(path, "no such checkpoint")
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors: Tree = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(path, f"truncated or damaged checkpoint ({e})", way_out) from e
    if "record" not in meta:
        raise UserError(path, "not a checkpoint of mllm-fl (no record in its header)")
    if digest(tensors) != meta.get("digest"):
        raise UserError(path, "damaged checkpoint (digest differs)", way_out)
    try:
        record: dict[str, Any] = json.loads(meta["record"])
    except ValueError as e:
        raise UserError(path, f"damaged checkpoint (its record: {e})", way_out) from e
    return tensors, record


def fit(tensors: Tree, like: Tree, path: Path) -> Tree:
    """``tensors`` if they have exactly the names, shapes and dtypes of ``like``.

    Raises:
        UserError: it is a checkpoint of another model; names the first difference.
    """
    for k in like:
        if k not in tensors:
            raise UserError(path, f"checkpoint of another model: it lacks {k}", "check [model] and the class count")
        if tensors[k].shape != like[k].shape:
            raise UserError(
                path,
                f"checkpoint of another model: {k} is {tuple(tensors[k].shape)} there, {tuple(like[k].shape)} here",
                "check [model] and the class count",
            )
        if tensors[k].dtype != like[k].dtype:
            raise UserError(path, f"checkpoint of another model: {k} is {tensors[k].dtype} there, {like[k].dtype} here")
    extra = sorted(tensors.keys() - like.keys())
    if extra:
        raise UserError(path, f"checkpoint of another model: it has {extra[0]} besides", "check [model]")
    return {k: tensors[k] for k in like}
