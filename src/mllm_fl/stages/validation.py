"""A round chosen without the test images: held-out server images, scored in every evaluated round.

``federate.validation_per_class`` asks for so many images of every class from what no client holds, none of them among the server's other images. A class of which
less is left stays out, and the set's name says so (CReFF's long tail keeps the largest class whole). The score is the mean of
the class accuracies; the first round with the highest is chosen, and its test accuracy is what ``chosen`` in final.json quotes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream


def held_out(federation: Federation, per_class: int, others: Sequence[ImageSet | None], seed: int) -> ImageSet:
    """``per_class`` leftover images of every class that has so many, drawn by the data's seed; none is among ``others`` by its pixels.

    Raises:
        UserError: most classes have not so many.
    """
    left = federation.leftover
    taken = {h for images in others if images is not None for h in images.hashes()}
    chosen: list[int] = []
    without: list[str] = []
    for c, name in enumerate(federation.class_names):
        mine = np.flatnonzero(left.labels == c)
        mine = mine[numpy_stream(seed, "validation", c).permutation(len(mine))]
        free: list[int] = []
        for i in mine.tolist():
            if len(free) == per_class:
                break
            if not taken or left.subset([i]).hashes()[0] not in taken:
                free.append(i)
        if len(free) < per_class:
            without.append(name)
        else:
            chosen += free
    if 2 * len(without) > len(federation.class_names):
        problem = (
            f"{len(without)} of {len(federation.class_names)} classes have no {per_class} images that nobody else uses"
        )
        raise UserError("federate.validation_per_class", problem, "ask for fewer, or leave it out")
    none = f", none of {', '.join(without)}" if without else ""
    return left.subset(chosen, f"{left.name}, {per_class} a class{none}")


def chosen(rows: Sequence[Mapping[str, Any]], images: ImageSet | None) -> dict[str, Any] | None:
    """The first round with the highest validation score and its test accuracy; None without validation images."""
    known = [r for r in rows if r.get("validation") is not None]
    if images is None or not known:
        return None
    best = max(known, key=lambda r: (r["validation"], -r["round"]))
    return {
        "round": best["round"], "accuracy": best["accuracy"], "validation": best["validation"],
        "images": len(images), "source": images.name, "rule": "highest mean class accuracy on held-out images",
    }  # fmt: skip
