"""Checks of the pictures, before anybody is asked about them: decodable, large enough, no copy of another or of an evaluation image, allowed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_fl.annotate.quality import near
from mllm_fl.annotate.quality.sheet import Sheet
from mllm_fl.data.check import prints_of
from mllm_fl.data.config import DataConfig
from mllm_fl.data.decode import to_array, to_rgb
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent

Inspect = Callable[[Image.Image], str | None]
"""A plug-in: why this RGB picture is not wanted, or None."""


@dataclass(frozen=True)
class Known:
    """What is known of an evaluation set: exact digests and looks, with places for messages."""

    digests: Mapping[str, str]
    looks: Sequence[near.Look]
    places: Sequence[str]


def evaluation(sources: Sequence[str], root: str | None, progress: Progress = silent) -> Known:
    """The test images of these sources, named as in the ``[data]`` table."""
    digests: dict[str, str] = {}
    looks: list[near.Look] = []
    places: list[str] = []
    for source in sources:
        test = load_source(DataConfig(source=source, root=root)).test
        for i, (stored, used) in enumerate(test.pairs(range(len(test)))):
            place = f"{test.name} {i}"
            for digest in prints_of(stored, used):
                digests.setdefault(digest, place)
            looks.append(near.look(Image.fromarray(stored.transpose(1, 2, 0).copy())))
            places.append(place)
            if i % 1000 == 0:
                progress(Event("check", i, len(test), f"looking at {test.name}"))
    return Known(digests, looks, places)


def inspect_pictures(
    folder: Path,
    images: Sequence[str],
    facts: Mapping[str, Mapping[str, Any]],
    *,
    min_side: int,
    max_aspect: float,
    licences: Sequence[str],
    known: Known | None,
    plugins: Mapping[str, Inspect],
    progress: Progress = silent,
) -> Sheet:
    """All checks of the pictures at these paths. ``facts``: what the acquisition knows of each (licence, opt_out); may lack any."""
    sheet = Sheet("images", images)
    for check in ("decodable", "size", "duplicate", "near_duplicate"):
        sheet.begin(check)
    sheet.begin("evaluation", None if known is not None else "no evaluation set was named (--evaluation)")
    sheet.begin("licence", None if licences else "no list of allowed licences was given (--licence)")
    sheet.begin("opt_out")
    for name in ("nsfw", "faces"):
        if name not in plugins:
            sheet.begin(name, "no detector was given (--inspect)")
    for name in plugins:
        sheet.begin(name)
    seen: dict[str, str] = {}
    looks: list[near.Look] = []
    looked: list[str] = []
    for n, image in enumerate(images):
        progress(Event("check", n, len(images), "pictures"))
        _permitted(sheet, image, facts.get(image, {}), licences)
        try:
            picture = to_rgb(folder / image)
        except ValueError as e:
            sheet.failed["decodable"][image] = str(e)
            for check in ("size", "duplicate", "near_duplicate", "evaluation", *plugins):
                sheet.unchecked[check][image] = "cannot be decoded"
            continue
        _sized(sheet, image, picture, min_side, max_aspect)
        digest = prints_of(array := to_array(picture), array)[0]
        if digest in seen:
            sheet.failed["duplicate"][image] = f"equals {seen[digest]}"
            sheet.unchecked["near_duplicate"][image] = "is an exact duplicate"
        else:
            seen[digest] = image
            looks.append(near.look(picture))
            looked.append(image)
        if known is not None and digest in known.digests:
            sheet.failed["evaluation"][image] = f"equals {known.digests[digest]}"
        for name, plugin in plugins.items():
            try:
                why = plugin(picture)
            except Exception as e:  # a user's function may raise anything
                raise UserError(
                    f"--inspect {name}",
                    f"raised {type(e).__name__} on {image}: {e}",
                    "mend the detector, or leave it out",
                ) from e
            if why is not None:
                sheet.failed[name][image] = why
    _alike(sheet, looked, looks, known)
    return sheet


def _sized(sheet: Sheet, image: str, picture: Image.Image, min_side: int, max_aspect: float) -> None:
    short, long = sorted(picture.size)
    if short < min_side:
        sheet.failed["size"][image] = f"{picture.width}x{picture.height}, a side is below {min_side} pixels"
    elif long > max_aspect * short:
        sheet.failed["size"][image] = f"{picture.width}x{picture.height}, longer than {max_aspect:g} times its width"


def _permitted(sheet: Sheet, image: str, facts: Mapping[str, Any], licences: Sequence[str]) -> None:
    if licences:
        licence = facts.get("licence")
        if not licence:
            sheet.unchecked["licence"][image] = "its licence is not known"
        elif str(licence).lower() not in {x.lower() for x in licences}:
            sheet.failed["licence"][image] = f"{licence} is not among {', '.join(licences)}"
    if facts.get("opt_out") is None:
        sheet.unchecked["opt_out"][image] = "the source says nothing of opting out"
    elif facts["opt_out"]:
        sheet.failed["opt_out"][image] = "its holder has opted out"


def _alike(sheet: Sheet, images: Sequence[str], looks: list[near.Look], known: Known | None) -> None:
    """Near-duplicates: the first of a group stays, the others fall; one of an evaluation set falls in any case."""
    n = len(images)
    pairs: Iterable[tuple[int, int, int]] = near.near_pairs(looks + list(known.looks if known else ()))
    fallen: set[int] = set()
    for i, j, bits in pairs:
        if i >= n:
            continue
        if j < n:
            if i not in fallen and j not in fallen:
                fallen.add(j)
                sheet.failed["near_duplicate"][images[j]] = f"looks like {images[i]} ({bits} of 64 bits differ)"
        elif known is not None:
            sheet.failed["evaluation"].setdefault(
                images[i], f"looks like {known.places[j - n]} ({bits} of 64 bits differ)"
            )


def plugin(text: str) -> tuple[str, Inspect]:
    """``name=module:function`` as a name and the function.

    Raises:
        UserError: another form, or it cannot be imported.
    """
    name, _, where = text.partition("=")
    module, _, function = where.partition(":")
    if not (name and module and function):
        raise UserError(
            f"--inspect {text}", "is not of the form name=module:function", "for example nsfw=mychecks:nsfw"
        )
    try:
        found: Inspect = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--inspect {text}", f"cannot be imported ({e})", "install it, or set PYTHONPATH") from None
    return name, found
