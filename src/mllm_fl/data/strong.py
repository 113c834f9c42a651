"""A strong view of a batch that is already normalised: colour, geometry and a cut-out square, drawn from numbers that are handed in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 10
"""Uniform numbers that one image's strong view consumes."""


def strong_view(x: Tensor, u: Tensor) -> Tensor:
    """The images (n, 3, h, w), each changed by its row of ``u`` (n, DRAWS), uniform in [0, 1). Shape (n, 3, h, w).

    In this order: brightness + (u - 0.5), saturation times 2u about the grey value, contrast times u + 0.5 about the mean; rotation within 30
    degrees, scale within 1/1.2 .. 1.2 per axis, shear within 0.3; left to right with probability 1/2; a square of half the side set to 0, the mean colour, its centre anywhere.
    The colour ranges are those of DSA (Zhao & Bilen 2021, arXiv:2102.08259), the square is Cutout's (arXiv:1708.04552). Zero fills what turns in.
    """
    n, _, height, width = x.shape
    v = [u[:, i].view(-1, 1, 1, 1) for i in range(3)]
    x = x + (v[0] - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * v[1]) + grey
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * (v[2] + 0.5) + middle
    angle = (2 * u[:, 3] - 1) * math.radians(30)
    sx, sy = (1.2 ** (2 * u[:, i] - 1) for i in (4, 5))
    shear = 0.6 * u[:, 6] - 0.3
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [torch.stack([sx * cos, -sin + shear, zero], 1), torch.stack([sin, sy * cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, height, width], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    half_h, half_w = height // 4, width // 4
    cy, cx = (u[:, 7] * height).long().view(-1, 1), (u[:, 8] * width).long().view(-1, 1)
    in_y, in_x = (
        (torch.arange(side, device=x.device) - c + half >= 0) & (torch.arange(side, device=x.device) - c < half)
        for side, c, half in ((height, cy, half_h), (width, cx, half_w))
    )
    turned = torch.where((u[:, 9] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    return turned.masked_fill((in_y[:, None, :, None] & in_x[:, None, None, :]), 0.0)
