"""Differentiable Siamese augmentation, one random operation a call, shared by the whole batch.

Zhao, Bilen: Dataset Condensation with Differentiable Siamese Augmentation, 2021, arXiv:2102.08259, section 3.2, with the
parameters of CReFF's code. Images are already normalised, so that 0 is the mean colour. "Siamese" means that
every image of the batch gets the same parameters.

What we changed: all draws come from one generator that is handed in. Their code re-seeds torch's global stream before each
draw with the milliseconds of the clock, so that no run of theirs can be repeated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STRATEGY = ("color", "crop", "cutout", "flip", "scale", "rotate")


def siamese(x: Tensor, generator: torch.Generator, strategy: tuple[str, ...] = STRATEGY) -> Tensor:
    """One of the operations of ``strategy``, drawn uniformly, applied to all images (n, 3, h, w) alike. Same shape.

    ``generator``: a CPU generator, wherever ``x`` lies.
    """
    chosen = strategy[int(torch.randint(len(strategy), (), generator=generator))]
    return OPERATIONS[chosen](x, generator)


def color(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness + (u - 1/2), then saturation times 2u about the channel mean, then contrast times (u + 1/2) about the image's mean."""
    bright, saturated, contrasted = (float(u) for u in torch.rand(3, generator=generator))
    x = x + (bright - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturated) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrasted + 0.5) + mean


def crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """A shift of at most an eighth of each side (4 pixels of 32), zeros moving in."""
    height, width = x.shape[2:]
    most_y, most_x = int(height / 8 + 0.5), int(width / 8 + 0.5)
    top, left = _draw(2 * most_y + 1, generator), _draw(2 * most_x + 1, generator)
    return F.pad(x, [most_x, most_x, most_y, most_y])[:, :, top : top + height, left : left + width]


def cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    """A zero square of half the side (16 pixels of 32) around a uniform centre, cut off at the border."""
    spans = []
    for side in x.shape[2:]:
        hole = int(side / 2 + 0.5)
        first = _draw(side + 1 - hole % 2, generator) - hole // 2
        spans.append(slice(max(first, 0), first + hole))
    x = x.clone()
    x[:, :, spans[0], spans[1]] = 0
    return x


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Left to right, with probability 1/2."""
    return x.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else x


def scale(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each axis by a factor of its own in [1/1.2, 1.2], bilinear, zeros beyond the border; the factor maps output to input."""
    low = 1 / 1.2
    sx, sy = (low + (1.2 - low) * torch.rand(2, generator=generator)).tolist()
    return _affine(x, ((sx, 0.0, 0.0), (0.0, sy, 0.0)))


def rotate(x: Tensor, generator: torch.Generator) -> Tensor:
    """By an angle uniform in +-15 degrees, bilinear, zeros beyond the border."""
    angle = (2 * float(torch.rand((), generator=generator)) - 1) * math.radians(15)
    c, s = math.cos(angle), math.sin(angle)
    return _affine(x, ((c, -s, 0.0), (s, c, 0.0)))


OPERATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _affine(x: Tensor, theta: tuple[tuple[float, ...], ...]) -> Tensor:
    grid = F.affine_grid(torch.tensor([theta], device=x.device, dtype=x.dtype), [1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)
