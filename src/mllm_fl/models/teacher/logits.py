"""A frozen teacher's zero-shot logits of a set of images: computed once, kept on disk.

The teacher sees each image un-augmented, so that its logits are constants of the run, of all arms and of all seeds on the same images.
A file belongs to one ordered set, not to one image: which images share a batch moves the last bits of a logit, and a run must not
depend on what others have cached before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.files import write_whole
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.trees import digest

BATCH = 256


class ZeroShot(Protocol):
    """What is asked of a teacher; :class:`mllm_fl.models.teacher.clip.ClipTeacher` has it."""

    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def logit_scale(self) -> float: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor: ...


def logits_key(
    teacher: ZeroShot, images: ImageSet, class_names: Sequence[str], templates: Sequence[str] | None = None
) -> str:
    """SHA-256 over all that the logits depend on: the teacher's weights and preprocessing, prompts, class names, every image in order."""
    prompts = list(templates or teacher.templates)
    depends = ["zero-shot logits 1", teacher.fingerprint, prompts, list(class_names), pixel_hashes(images)]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def teacher_logits(
    teacher: ZeroShot,
    images: ImageSet,
    class_names: Sequence[str],
    folder: Path,
    templates: Sequence[str] | None = None,
) -> Tensor:
    """Zero-shot logits (N, C), float32, of un-augmented ``images``, from ``folder`` when they are there, else computed and put there.

    The file is whole or not there; one that is damaged or of another key is computed again. Two processes that ask at once compute once.

    Raises:
        UserError: the folder cannot be written, or the teacher answers NaN or Inf.
    """
    key = logits_key(teacher, images, class_names, templates)
    path, shape = folder / f"zero-shot-{key[:24]}.safetensors", (len(images), len(class_names))
    found = _read(path, key, shape)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            found = _read(path, key, shape)
            if found is None:
                found = _compute(teacher, images, class_names, templates)
                write_whole(path, save({"logits": found}, metadata={"record": _record(key, found)}))
    except OSError as e:
        problem = f"the teacher's logits cannot be cached ({e.strerror or e})"
        raise UserError(folder, problem, "choose a writable folder with free space") from None
    return found


def _read(path: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as f:
            meta, logits = f.metadata() or {}, f.get_tensor("logits")
    except (SafetensorError, OSError, ValueError):
        return None
    whole = meta.get("record") == _record(key, logits) and tuple(logits.shape) == shape
    return logits if whole and logits.dtype == torch.float32 else None


def _record(key: str, logits: Tensor) -> str:
    """One entry: several would be written in another order each time."""
    return json.dumps({"key": key, "digest": digest({"logits": logits})})


@torch.no_grad()
def _compute(
    teacher: ZeroShot, images: ImageSet, class_names: Sequence[str], templates: Sequence[str] | None
) -> Tensor:
    texts = teacher.class_embeddings(class_names, templates)
    parts = [
        teacher.logit_scale * teacher.encode_images(images.read(batch.tolist())) @ texts.T
        for batch in torch.arange(len(images)).split(BATCH)
        if len(batch)
    ]
    logits = torch.cat([torch.empty(0, len(class_names)), *(p.float().cpu() for p in parts)]).contiguous()
    if not bool(torch.isfinite(logits).all()):
        raise UserError("teacher", f"zero-shot logits of {images.name} are not finite", "check the teacher's weights")
    return logits
