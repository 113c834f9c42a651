"""Random crop and flip of a batch that is already normalised, as CReFF-FL does it (PROTOCOL 1.4) or per sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm_fl.errors import UserError

AugmentMode = Literal["batch", "sample"]


def scaled_padding(size: int) -> int:
    """Padding in pixels that is to ``size`` what 4 is to CIFAR's 32, rounded to nearest, at least 1."""
    return max(1, round(4 * size / 32))


def augment(x: Tensor, generator: torch.Generator, *, padding: int, flip: bool, mode: str) -> Tensor:
    """A random crop of the zero-padded images, then a horizontal flip with probability 1/2. Shape (n, 3, height, width).

    Zero is the mean colour, because the batch is normalised. ``mode="batch"`` draws one offset and one flip for the whole
    batch, which is what torchvision's transforms do on a batched tensor and therefore what CReFF trained with;
    ``"sample"`` draws for each image. ``generator`` is a CPU generator, wherever ``x`` lies.
    """
    if mode not in ("batch", "sample"):
        raise UserError("aug_mode", f"{mode!r} is unknown", "use 'batch' or 'sample'")
    n, _, height, width = x.shape
    if mode == "batch":
        if padding:
            top, left = torch.randint(0, 2 * padding + 1, (2,), generator=generator).tolist()
            x = pad(x, [padding] * 4)[:, :, top : top + height, left : left + width]
        return x.flip(3) if flip and torch.rand((), generator=generator).item() < 0.5 else x
    if padding:
        tops, lefts = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(x.device)
        windows = (
            pad(x, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        )  # a view: (n, 3, offsets, offsets, h, w)
        x = windows[torch.arange(n, device=x.device), :, tops, lefts]
    if flip:
        turned = (torch.rand(n, generator=generator) < 0.5).to(x.device)
        x = torch.where(turned[:, None, None, None], x.flip(3), x)
    return x
