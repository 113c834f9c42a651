"""The strong view is a function of the numbers it is given: the neutral ones change nothing but the square, each other number does what it says."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_fl.data.strong import DRAWS, strong_view

NEUTRAL = [0.5] * 7 + [0.0, 0.0, 0.9]  # no colour, no geometry; the square's centre at the corner; no flip


def view(x: Tensor, **changed: float) -> Tensor:
    u = torch.tensor([NEUTRAL] * len(x))
    for name, value in changed.items():
        u[:, int(name.removeprefix("u"))] = value
    return strong_view(x, u)


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_neutral_numbers_cut_the_corner_and_nothing_else() -> None:
    x, seen = picture(), view(picture())
    assert len(NEUTRAL) == DRAWS
    assert torch.all(seen[:, :, :2, :2] == 0)  # a quarter of the 4 x 4 square hangs inside
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[:2, :2] = False
    assert torch.allclose(seen[..., outside], x[..., outside], atol=1e-5)


def test_colour() -> None:
    x = picture()
    brighter = view(x, u0=0.9)
    assert torch.allclose(brighter[..., 4:, 4:], x[..., 4:, 4:] + 0.4, atol=1e-5)
    grey = view(x, u1=0.0)[..., 4:, 4:]
    assert torch.allclose(grey, x.mean(1, keepdim=True).expand_as(x)[..., 4:, 4:], atol=1e-5)
    flat, mean = view(x, u2=0.0)[..., 4:, 4:], x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(flat, ((x - mean) * 0.5 + mean)[..., 4:, 4:], atol=1e-5)


def test_geometry_and_flip() -> None:
    x = picture()
    assert torch.allclose(view(x, u9=0.1)[..., 4:, 4:], x.flip(3)[..., 4:, 4:], atol=1e-5)
    for number in (3, 4, 5, 6):
        assert not torch.allclose(view(x, **{f"u{number}": 0.9})[..., 4:, 4:], x[..., 4:, 4:], atol=1e-2)
    flat = torch.ones(1, 3, 8, 8)
    assert float(view(flat, u3=1.0)[0, 0, 4:, 4:].min()) < 0.9  # what turns in is zero


def test_the_square_follows_its_centre_and_each_image_its_row() -> None:
    x, u = torch.ones(2, 3, 8, 8), torch.tensor([NEUTRAL, NEUTRAL])
    u[1, 7:9] = 0.5
    seen = strong_view(x, u)
    assert torch.all(seen[1, :, 2:6, 2:6] == 0) and float(seen[1].sum()) == 3 * (64 - 16)
    assert float(seen[0].sum()) == 3 * (64 - 4)
