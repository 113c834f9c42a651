"""CLIPScore of annotations (Hessel et al. 2021, arXiv:2104.08718): 2.5 * max(cos(image, text), 0), the mean over a record's sentences.

What is a good score depends on the CLIP, so records fall by percentile, never by an absolute value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mllm_fl.annotate.records import Record
from mllm_fl.data.decode import fit, to_array, to_rgb
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.teacher.clip import load_clip

WEIGHT = 2.5


def scores(
    folder: Path, records: Sequence[Record], name: str, progress: Progress = silent, batch: int = 64
) -> dict[str, float]:
    """Record id -> its score under the CLIP called ``name``; records whose picture cannot be decoded are left out."""
    clip = load_clip(name)
    side = int(clip.model.config.vision_config.image_size)
    by_image: dict[str, list[Record]] = {}
    for record in records:
        by_image.setdefault(record.image, []).append(record)
    images = list(by_image)
    out: dict[str, float] = {}
    for start in range(0, len(images), batch):
        progress(Event("check", start, len(images), "CLIP score"))
        pictures = {}
        for image in images[start : start + batch]:
            try:
                drawn = to_rgb(folder / image)
            except ValueError:
                continue
            pictures[image] = torch.from_numpy(to_array(fit(drawn, side)).copy())
        if not pictures:
            continue
        seen = dict(zip(pictures, clip.encode_images(torch.stack(list(pictures.values()))), strict=True))
        said = [(r, s) for image in pictures for r in by_image[image] for s in sentences(r)]
        texts = clip.encode_texts([s for _, s in said]) if said else torch.zeros(0, 1)
        of: dict[str, list[float]] = {}
        for (record, _), text in zip(said, texts, strict=True):
            of.setdefault(record.id, []).append(WEIGHT * max(float(text @ seen[record.image]), 0.0))
        out |= {id: float(np.mean(values)) for id, values in of.items()}
    return out


def sentences(record: Record) -> list[str]:
    """The sentences of the answers; those of one word (yes, no) say nothing about a picture and are left out where there are others."""
    parts = [s.strip() for t in record.answers for s in re.split(r"(?<=[.!?])\s+", t) if s.strip()]
    return [s for s in parts if len(s.split()) > 1] or parts


def lowest(found: dict[str, float], percentile: float) -> tuple[float, list[str]]:
    """The score at this percentile, and the records strictly below it."""
    if not found:
        return 0.0, []
    edge = float(np.percentile(list(found.values()), percentile))
    return edge, [id for id, value in found.items() if value < edge]
