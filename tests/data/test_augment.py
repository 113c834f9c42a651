"""Crop and flip on the normalised batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm_fl.data.augment import Draws, augment, cropped, draws, scaled_padding
from mllm_fl.errors import UserError
from mllm_fl.seeds import stream


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(n: int, size: int = 8) -> Tensor:
    """n different images without a zero pixel, so that padding can be seen."""
    return torch.arange(1, n * 3 * size * size + 1, dtype=torch.float32).view(n, 3, size, size)


def shifts(before: Tensor, after: Tensor, padding: int) -> set[tuple[int, int, bool]]:
    """All (top, left, flipped) that turn one image into the other; the oracle, by trying each."""
    size = before.shape[-1]
    padded = pad(before, [padding] * 4)
    found = set()
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + size, left : left + size]
            found |= {
                (top, left, flip) for flip in (False, True) if torch.equal(after, window.flip(2) if flip else window)
            }
    return found


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_every_image_is_a_crop_of_its_padded_self_perhaps_mirrored(mode: str) -> None:
    x = ramp(16)
    y = augment(x, generator(), padding=2, flip=True, mode=mode)
    found = [shifts(a, b, 2) for a, b in zip(x, y, strict=True)]
    assert y.shape == x.shape and all(len(f) == 1 for f in found)
    if mode == "batch":
        assert len(set.union(*found)) == 1  # one draw for the whole batch
    else:
        assert len(set.union(*found)) > 8


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_all_offsets_and_both_directions_occur(mode: str) -> None:
    seen: set[tuple[int, int, bool]] = set()
    for seed in range(120):
        x = ramp(2)
        seen |= shifts(x[0], augment(x, generator(seed), padding=1, flip=True, mode=mode)[0], 1)
    assert seen == {(top, left, flip) for top in range(3) for left in range(3) for flip in (False, True)}


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_nothing_asked_nothing_done_and_the_input_stays(mode: str) -> None:
    x = ramp(3)
    assert torch.equal(augment(x, generator(), padding=0, flip=False, mode=mode), x)
    augment(x, generator(), padding=2, flip=True, mode=mode)
    assert torch.equal(x, ramp(3))


def test_the_generator_alone_decides() -> None:
    x = ramp(5)
    torch.manual_seed(1)
    one = augment(x, generator(3), padding=2, flip=True, mode="sample")
    torch.manual_seed(2)
    assert torch.equal(one, augment(x, generator(3), padding=2, flip=True, mode="sample"))
    assert not torch.equal(one, augment(x, generator(4), padding=2, flip=True, mode="sample"))


def test_padding_scales_with_the_image_and_modes_are_checked() -> None:
    assert [scaled_padding(size) for size in (4, 8, 16, 28, 32, 64, 224)] == [1, 1, 2, 4, 4, 8, 28]
    with pytest.raises(UserError, match="use 'batch' or 'sample'"):
        augment(ramp(1), generator(), padding=1, flip=True, mode="stars")


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("flip", [True, False])
def test_one_gather_from_stored_pixels_gives_the_augmented_batch(mode: str, flip: bool) -> None:
    """Three batches of four images at a time: the same numbers as normalising, padding, cropping and flipping each."""
    pixels = torch.randint(0, 256, (9, 3, 8, 6), dtype=torch.uint8, generator=stream(0, "pixels"))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    at = torch.tensor([[0, 5, 5, 8], [1, 2, 3, 4], [8, 7, 6, 0]])
    options = {"padding": 2, "flip": flip, "mode": mode}
    whole = (pixels.float() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    expected = [augment(whole[a], stream(k, "augment"), **options) for k, a in enumerate(at)]  # type: ignore[arg-type]
    drawn = [draws(4, stream(k, "augment"), **options) for k in range(3)]  # type: ignore[arg-type]
    stacked = Draws(*(torch.stack([v.expand(4) for v in column]) for column in zip(*drawn, strict=True)))
    assert torch.equal(cropped(pixels, at, stacked, 2, mean, std), torch.stack(expected))
