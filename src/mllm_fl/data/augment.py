"""Random crop and flip of a batch that is already normalised, as CReFF-FL does it (PROTOCOL 1.4) or per sample."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm_fl.errors import UserError

AugmentMode = Literal["batch", "sample"]


class Draws(NamedTuple):
    """What a batch's augmentation has drawn, for each image or, of length 1, for all: offsets int64 into the padded image, flips bool."""

    top: Tensor
    left: Tensor
    turned: Tensor


def scaled_padding(size: int) -> int:
    """Padding in pixels that is to ``size`` what 4 is to CIFAR's 32, rounded to nearest, at least 1."""
    return max(1, round(4 * size / 32))


def draws(n: int, generator: torch.Generator, *, padding: int, flip: bool, mode: str) -> Draws:
    """The numbers of one batch of ``n`` images: offsets, if it is padded, then flips, if it is flipped; one of each in mode "batch"."""
    if mode not in ("batch", "sample"):
        raise UserError("aug_mode", f"{mode!r} is unknown", "use 'batch' or 'sample'")
    count = 1 if mode == "batch" else n
    top = left = torch.zeros(count, dtype=torch.int64)
    if padding:
        top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    turned = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    return Draws(top, left, turned)


def augment(x: Tensor, generator: torch.Generator, *, padding: int, flip: bool, mode: str) -> Tensor:
    """A random crop of the zero-padded images, then a horizontal flip with probability 1/2. Shape (n, 3, height, width).

    Zero is the mean colour, because the batch is normalised. ``mode="batch"`` draws one offset and one flip for the whole
    batch, which is what torchvision's transforms do on a batched tensor and therefore what CReFF trained with;
    ``"sample"`` draws for each image. ``generator`` is a CPU generator, wherever ``x`` lies.
    """
    n, _, height, width = x.shape
    drawn = draws(n, generator, padding=padding, flip=flip, mode=mode)
    if mode == "batch":
        if padding:
            top, left = int(drawn.top), int(drawn.left)
            x = pad(x, [padding] * 4)[:, :, top : top + height, left : left + width]
        return x.flip(3) if bool(drawn.turned) else x
    if padding:
        tops, lefts = drawn.top.to(x.device), drawn.left.to(x.device)
        windows = (
            pad(x, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        )  # a view: (n, 3, offsets, offsets, h, w)
        x = windows[torch.arange(n, device=x.device), :, tops, lefts]
    if flip:
        turned = drawn.turned.to(x.device)
        x = torch.where(turned[:, None, None, None], x.flip(3), x)
    return x


def cropped(pixels: Tensor, at: Tensor, drawn: Draws, padding: int, mean: Tensor, std: Tensor) -> Tensor:
    """What :func:`augment` makes of the normalised images ``at`` these positions of ``pixels``, in one gather, for any number of batches.

    ``pixels`` uint8 (N, 3, height, width); ``at`` and the drawn numbers int64 of one shape (...); ``mean`` and ``std`` (3,) on the
    0..1 scale; all on one device. Float32, shape (..., 3, height, width), equal to ``augment``'s result number by number.
    """
    height, width = pixels.shape[-2:]
    rows = drawn.top[..., None] + torch.arange(height, device=at.device) - padding
    cols = torch.arange(width, device=at.device).expand(*at.shape, width)
    cols = torch.where(drawn.turned[..., None].bool(), width - 1 - cols, cols) + drawn.left[..., None] - padding
    inside = ((rows >= 0) & (rows < height))[..., None, :, None] & ((cols >= 0) & (cols < width))[..., None, None, :]
    rows, cols = rows.clamp(0, height - 1)[..., None, :, None], cols.clamp(0, width - 1)[..., None, None, :]
    channel = torch.arange(3, device=at.device)[:, None, None]
    x = pixels[at[..., None, None, None], channel, rows, cols].float().div_(255.0)
    x = x.sub_(mean[:, None, None]).div_(std[:, None, None])
    return torch.where(inside, x, torch.zeros((), device=x.device))
