"""Open images that need no network: characters rendered from fonts, each with the exact record of its scene.

Every glyph is normalised the way scikit-learn's handwritten digits were: the drawn character is fitted to a bitmap of
32 x 32 bits whose height it fills, and the bits of each 4 x 4 block are counted, which gives 8 x 8 values of 0..16
(E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, with NIST's preprocessing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import atan, degrees, radians, tan
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.data.fonts import FACES, UNIT, Face, Master, masters
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Capital letters without I and O: once the bounding box is normalised nothing separates them from 1 and 0."""
CHARACTERS = DIGITS + LETTERS
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_CHUNK = 2000
_ITALIC = 12.0  # degrees by which the italic faces lean
_NODES = 4  # the elastic displacement is drawn at 4 x 4 nodes and interpolated


@dataclass(frozen=True)
class Scene:
    """What is in one rendered image, exactly; the truth that an annotation is checked against.

    ``stroke`` and ``width`` are in cells (the glyph is 8 cells high), ``position`` is the horizontal offset of the
    glyph's centre in cells, ``slant`` (shear, including that of an italic face) and ``rotation`` are in degrees,
    positive to the right, ``elastic`` is the rms displacement in cells, ``scan`` the bits per height of the bitmap.
    """

    character: str
    name: str
    kind: str
    family: str
    face_weight: str
    italic: bool
    pen: bool
    alternate: bool
    stroke: float
    slant: float
    rotation: float
    width: float
    position: float
    elastic: float
    scan: int
    polarity: str = "light on dark"

    @property
    def lean(self) -> float:
        """The angle that an eye sees, in degrees: shear and rotation together."""
        return self.slant + self.rotation

    @property
    def weight(self) -> str:
        """``"thin"``, ``"medium"`` or ``"bold"``: the thickness of the stroke as it was drawn."""
        return "thin" if self.stroke < 1.15 else "bold" if self.stroke > 1.6 else "medium"

    @property
    def posture(self) -> str:
        """``"left"``, ``"upright"`` or ``"right"``: where the character leans to."""
        return "left" if self.lean < -8 else "right" if self.lean > 12 else "upright"

    @property
    def proportion(self) -> str:
        """``"narrow"``, ``"normal"`` or ``"wide"``."""
        return "narrow" if self.width < 4.75 else "wide" if self.width > 6.25 else "normal"

    def to_json(self) -> dict[str, Any]:
        """All fields and the words derived from them, as plain values."""
        return asdict(self) | {"weight": self.weight, "posture": self.posture, "proportion": self.proportion}


def character_name(character: str) -> str:
    """``"7"`` -> ``"seven"``; a letter is its own name."""
    return DIGIT_NAMES[int(character)] if character in DIGITS else character


def character_of(name: str) -> str:
    """The character that a class name means: ``"seven"``, ``"7"``, ``"digit_7"`` -> ``"7"``, ``"letter A"`` -> ``"A"``."""
    word = name.strip().replace("_", " ").split(" ")[-1]
    if word.lower() in DIGIT_NAMES:
        return str(DIGIT_NAMES.index(word.lower()))
    if len(word) == 1 and word.upper() in CHARACTERS + "IO":
        return word.upper()
    raise UserError(
        f"glyphs: class {name!r}", "no glyph is known by this name", "use digits or letters, or other open images"
    )


def render_glyphs(
    count: int, seed: int, characters: str = CHARACTERS, image_size: int = 16, cache: Path | None = None
) -> tuple[ImageSet, list[Scene]]:
    """``count`` glyphs with their scenes; glyph i depends on (seed, i, characters) only, never on ``count``.

    Characters are drawn evenly from ``characters``; one that occurs twice there is drawn twice as often. The labels are
    positions in ``class_names``, the names of the distinct characters in order. With ``cache``, a folder, the result
    is read from there when it was rendered before.
    """
    if count < 1 or image_size < 8:
        raise UserError(
            "glyphs", f"count {count} and image_size {image_size} are too small", "count >= 1, image_size >= 8"
        )
    distinct = "".join(dict.fromkeys(characters))
    choice = [distinct.index(c) for c in characters]
    labels = np.array(
        [choice[int(numpy_stream(seed, "glyph-character", i).integers(len(choice)))] for i in range(count)]
    )
    return _render(
        [distinct[label] for label in labels], seed, labels, tuple(map(character_name, distinct)), image_size, cache
    )


def glyph_set(
    names: Sequence[str], per_class: int, seed: int, image_size: int = 16, cache: Path | None = None, purpose: str = ""
) -> tuple[ImageSet, list[Scene]]:
    """``per_class`` glyphs of each named class, in the order of ``names``, which are also the set's class names.

    ``purpose`` names the stream beside the seed: sets of different purposes share no picture, nor does any with those of
    :func:`render_glyphs`, which the bundled teachers were trained on.
    """
    wanted = [character_of(name) for name in names]
    labels = np.repeat(np.arange(len(wanted)), per_class)
    return _render([wanted[label] for label in labels], seed, labels, tuple(names), image_size, cache, purpose)


def _render(
    texts: list[str],
    seed: int,
    labels: np.ndarray,
    names: tuple[str, ...],
    size: int,
    cache: Path | None,
    purpose: str = "",
) -> tuple[ImageSet, list[Scene]]:
    from mllm_fl.data import glyph_cache

    key = glyph_cache.key_of(texts, seed, purpose) if cache else ""
    found = glyph_cache.load(cache, key) if cache else None
    if found is None:
        blocks, scenes = [], []
        for start in range(0, len(texts), _CHUNK):
            cells, records = _draw(texts[start : start + _CHUNK], seed, start, purpose)
            blocks.append(cells)
            scenes.extend(records)
        found = torch.cat(blocks), scenes
        if cache:
            glyph_cache.save(cache, key, *found)
    native = cells_to_images(found[0], 8).numpy()  # resizing 8 to 8 changes nothing
    pixels = MemoryPixels(cells_to_images(found[0], size), native)
    return ImageSet("glyphs", pixels, labels.astype(np.int64), names), found[1]


def cells_to_images(cells: Tensor, image_size: int) -> Tensor:
    """8 x 8 counts of 0..16, shape (n, 8, 8) -> uint8, shape (n, 3, image_size, image_size), bilinear, equal channels."""
    grey = (cells.float() * (255.0 / 16.0)).round()[:, None]
    large = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class _Draw:
    """The random choices behind one glyph, in the master's units (pixels of the master, radians as slopes)."""

    master: Master
    pen: bool
    half: float  # half the stroke's thickness, master pixels
    shear: float
    rotation: float  # degrees
    breadth: float  # factor on the width
    amplitude: float  # of the elastic displacement, master pixels
    nodes: np.ndarray
    shift: float  # bits of 32
    scan: int


def _choose(text: str, seed: int, index: int, purpose: str) -> _Draw:
    rng = numpy_stream(seed, f"glyph {purpose}".rstrip(), index)
    face: Face = FACES[int(rng.integers(len(FACES)))]
    options = masters(text, face)
    master = options[int(rng.integers(len(options)))]
    u = rng.random(8)
    pen = bool(u[0] < 0.5)
    half = UNIT * (0.4 + 0.7 * u[1])
    if not pen:  # an outline is thinned or thickened towards that width as far as its hairlines allow
        half = master.half - min(max(master.half - half, -0.5 * UNIT), 0.7 * master.hairline)
    return _Draw(
        master, pen, half,
        shear=-0.25 + 0.6 * u[2], rotation=-12 + 24 * u[3], breadth=0.75 + 0.5 * u[4],
        amplitude=UNIT * 0.7 * u[5], nodes=rng.standard_normal((2, _NODES, _NODES)).astype(np.float32),
        shift=-1.5 + 3 * u[6], scan=int(10 + 23 * u[7]),
    )  # fmt: skip


def _draw(texts: list[str], seed: int, start: int, purpose: str) -> tuple[Tensor, list[Scene]]:
    """8 x 8 counts (uint8) and scenes of a chunk of glyphs, the first of which has index ``start``."""
    draws = [_choose(text, seed, start + i, purpose) for i, text in enumerate(texts)]
    ink = torch.stack([d.half - d.master.pen if d.pen else d.half - d.master.half - d.master.outline for d in draws])
    side = ink.shape[-1]
    column = partial(torch.tensor, dtype=torch.float32)
    # 1. Shear, rotation and elastic displacement: where each pixel of the drawing looks into the master.
    axis = (torch.arange(side) - (side - 1) / 2).float()
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = column([radians(d.rotation) for d in draws])[:, None, None]
    shear = column([d.shear for d in draws])[:, None, None]
    nodes = torch.from_numpy(np.stack([d.nodes * np.float32(d.amplitude) for d in draws]))
    bend = F.interpolate(nodes, size=(side, side), mode="bicubic", align_corners=True)
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    look = torch.stack([u + shear * v + bend[:, 0], v + bend[:, 1]], -1) / (side / 2)
    drawn = F.grid_sample(ink[:, None], look, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    # 2. The bounding box fills the height of 32 bits; its width follows the drawing, drawn towards 24 bits.
    top, bottom = _extent((drawn > 0).any(2))
    left, right = _extent((drawn > 0).any(1))
    height, natural = bottom - top, (right - left)
    breadth = column([d.breadth for d in draws])
    width = (32 * natural / height * breadth).clamp(5, 60)
    width = torch.where(width > 14, 0.5 * width + 12, width).clamp(max=28)
    shift = column([d.shift for d in draws])
    shift = shift.clamp(-(32 - width) / 2, (32 - width) / 2)
    scan = column([float(d.scan) for d in draws])
    bits = torch.arange(32) + 0.5
    down = _coarse(bits.expand(len(draws), -1) / 32, scan) * height[:, None] + top[:, None]
    across = (bits - 16 - shift[:, None]) / width[:, None] + 0.5
    across = _coarse(across, scan * width / 32) * natural[:, None] + left[:, None]
    where = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), -1) * (2 / side) - 1
    bitmap = F.grid_sample(drawn[:, None], where, mode="bilinear", padding_mode="border", align_corners=False)[:, 0] > 0
    # 3. Bits per 4 x 4 block.
    cells = bitmap.view(-1, 8, 4, 8, 4).sum((2, 4)).to(torch.uint8)
    scale = 8 / height
    scenes = [
        Scene(
            text, character_name(text), "digit" if text in DIGITS else "letter",
            d.master.face.family, d.master.face.weight, d.master.face.italic, d.pen, d.master.alternate,
            stroke=round(float(2 * d.half * s), 3),
            slant=round(degrees(atan(d.shear + (tan(radians(_ITALIC)) if d.master.face.italic else 0.0))), 2),
            rotation=round(float(d.rotation), 2), width=round(float(w) / 4, 3), position=round(float(p) / 4, 3),
            elastic=round(float(d.amplitude * s), 3), scan=d.scan,
        )
        for text, d, s, w, p in zip(texts, draws, scale, width, shift, strict=True)
    ]  # fmt: skip
    return cells, scenes


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of a (n, side) mask, as floats."""
    some = occupied.float()
    return some.argmax(1).float(), (occupied.shape[1] - some.flip(1).argmax(1)).float()


def _coarse(position: Tensor, steps: Tensor) -> Tensor:
    """Positions on 0..1 rounded to the centres of ``steps`` equal cells: a scanner of low resolution."""
    return (torch.floor(position * steps[:, None]) + 0.5) / steps[:, None]
