"""Characters as distance fields, made from the TrueType files that matplotlib installs (matplotlib is not imported)."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mllm_fl.errors import UserError

SIDE = 72
"""Pixels of a master's side; the character is at most 48 high or wide in its middle."""
BOX = 48
UNIT = BOX / 8
"""Master pixels of one cell of the 8 x 8 picture."""
_REACH = 12  # distances are exact up to this many pixels and cut off beyond


@dataclass(frozen=True)
class Face:
    """One font file."""

    file: str
    family: str
    weight: str = "regular"
    italic: bool = False


FACES = (
    Face("DejaVuSans.ttf", "sans"),
    Face("DejaVuSans-Bold.ttf", "sans", "bold"),
    Face("DejaVuSans-Oblique.ttf", "sans", italic=True),
    Face("DejaVuSans-BoldOblique.ttf", "sans", "bold", True),
    Face("DejaVuSansMono.ttf", "mono"),
    Face("DejaVuSansMono-Bold.ttf", "mono", "bold"),
    Face("DejaVuSansMono-Oblique.ttf", "mono", italic=True),
    Face("DejaVuSerif.ttf", "serif"),
    Face("DejaVuSerif-Bold.ttf", "serif", "bold"),
    Face("DejaVuSerif-Italic.ttf", "serif", italic=True),
    Face("STIXGeneral.ttf", "times"),
    Face("STIXGeneralBol.ttf", "times", "bold"),
    Face("STIXGeneralItalic.ttf", "times", italic=True),
    Face("cmr10.ttf", "computer modern"),
    Face("cmb10.ttf", "computer modern", "bold"),
    Face("cmti10.ttf", "computer modern", italic=True),
    Face("cmss10.ttf", "computer modern sans"),
    Face("cmtt10.ttf", "typewriter"),
)


@dataclass(frozen=True)
class Master:
    """A character of one face, shape (SIDE, SIDE) each, distances in master pixels.

    ``outline`` is the signed distance to the contour, negative inside; ``pen`` the distance to the character's middle
    line. ``half`` and ``hairline`` are half the thickness of its typical and of its thinnest strokes.
    ``alternate`` marks a form that people write and fonts lack: a crossed 7, a 1 without foot.
    """

    face: Face
    outline: Tensor
    pen: Tensor
    half: float
    hairline: float
    alternate: bool


def font_folder() -> Path:
    """The folder with matplotlib's TrueType files, found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "mpl-data" / "fonts" / "ttf"
        if all((folder / face.file).is_file() for face in FACES):
            return folder
    raise UserError("glyphs", "the fonts that matplotlib installs were not found", "pip install 'mllm-fl[report]'")


@functools.cache
def masters(text: str, face: Face) -> tuple[Master, ...]:
    """The forms of one character in one face: the font's own and, for some digits, the alternate one."""
    if text == "0" and face.family == "mono":  # its zero carries a slash, which no writer of the digits made
        face = FACES[0]
    ink = _bitmap(text, face)
    forms = [(ink, False)]
    if text == "7":
        forms.append((_crossed(ink), True))
    if text == "1":
        forms.append((_footless(ink), True))
    return tuple(_master(face, form, alternate) for form, alternate in forms)


@functools.cache
def _font(file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_folder() / file), 160)


def _bitmap(text: str, face: Face) -> np.ndarray:
    """The character fitted into the middle of a square, bool, shape (SIDE, SIDE)."""
    canvas = Image.new("L", (320, 320))
    ImageDraw.Draw(canvas).text((80, 60), text, fill=255, font=_font(face.file))
    box = canvas.getbbox()
    if box is None:
        raise UserError(f"glyphs: {face.file}", f"has no character {text!r}", "use digits and capital letters")
    glyph = canvas.crop(box)
    scale = BOX / max(glyph.size)
    glyph = glyph.resize(
        (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.BOX
    )
    square = Image.new("L", (SIDE, SIDE))
    square.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2))
    return np.asarray(square) >= 128


def _crossed(ink: np.ndarray) -> np.ndarray:
    """A bar through the stem at 55 % of the height, as wide as 60 % of the character."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    row = int(rows[0] + 0.55 * (rows[-1] - rows[0]))
    stem = float(np.flatnonzero(ink[row]).mean())
    reach = 0.3 * (columns[-1] - columns[0])
    out = ink.copy()
    out[row - 2 : row + 2, max(0, round(stem - reach)) : round(stem + reach) + 1] = True
    return out


def _footless(ink: np.ndarray) -> np.ndarray:
    """The lowest sixth cut down to the stem."""
    rows = np.flatnonzero(ink.any(1))
    cut = int(rows[0] + 0.8 * (rows[-1] - rows[0]))
    stem = np.flatnonzero(ink[int(rows[0] + 0.6 * (rows[-1] - rows[0]))])
    out = ink.copy()
    out[cut:, : max(0, stem[0] - 1)] = False
    out[cut:, stem[-1] + 2 :] = False
    return out


def _master(face: Face, ink: np.ndarray, alternate: bool) -> Master:
    inside, outside = _distance(~ink), _distance(ink)
    line = _thin(ink)
    thickness = inside[line]
    return Master(
        face,
        torch.from_numpy(outside - inside),
        torch.from_numpy(_distance(line)),
        float(np.median(thickness)),
        float(np.quantile(thickness, 0.1)),
        alternate,
    )


def _distance(to: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel to the nearest True, cut off at _REACH; exact, one axis after the other."""
    far = float(_REACH * _REACH)
    squared = np.where(to, 0.0, far)
    for axis in (0, 1):
        moved = np.moveaxis(squared, axis, 0)
        padded = np.pad(moved, ((_REACH, _REACH), (0, 0)), constant_values=far)
        n = moved.shape[0]
        best = np.min([padded[k : k + n] + (k - _REACH) ** 2 for k in range(2 * _REACH + 1)], axis=0)
        squared = np.moveaxis(best, 0, axis)
    return np.sqrt(np.minimum(squared, far)).astype(np.float32)


def _thin(ink: np.ndarray) -> np.ndarray:
    """The middle line of the strokes (T. Y. Zhang, C. Y. Suen, "A fast parallel algorithm for thinning", CACM 1984)."""
    p = ink.copy()
    while True:
        before = p.copy()
        for step in (0, 1):
            q = np.pad(p, 1)
            n, s, w, e = q[:-2, 1:-1], q[2:, 1:-1], q[1:-1, :-2], q[1:-1, 2:]
            nw, ne, sw, se = q[:-2, :-2], q[:-2, 2:], q[2:, :-2], q[2:, 2:]
            ring = np.stack([n, ne, e, se, s, sw, w, nw]).astype(np.int8)
            neighbours = ring.sum(0)
            crossings = ((ring == 0) & (np.roll(ring, -1, axis=0) == 1)).sum(0)
            a, b = (n & e & s, e & s & w) if step == 0 else (n & e & w, n & s & w)
            p = p & ~((neighbours >= 2) & (neighbours <= 6) & (crossings == 1) & ~a & ~b)
        if (p == before).all():
            return p
