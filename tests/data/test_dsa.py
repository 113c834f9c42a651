"""Each operation on images whose answer is known; one operation a call, the same for the whole batch, from the given stream alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mllm_fl.data import dsa
from mllm_fl.seeds import stream


def again(n: int) -> torch.Generator:
    return stream(n, "dsa")


def ramps(size: int = 32) -> Tensor:
    """Two images whose pixels are their own x and y in [-1, 1], by grid_sample's centres: bilinear sampling is exact on them."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    x = centres.expand(3, size, size)
    return torch.stack([x, x.mT])


def test_flip_is_left_to_right_about_every_second_time() -> None:
    x = torch.rand(2, 3, 4, 4, generator=again(0))
    turned = 0
    for n in range(400):
        y = dsa.flip(x, again(n))
        turned += bool(torch.equal(y, x.flip(3)))
        assert torch.equal(y, x) or torch.equal(y, x.flip(3))
    assert 160 < turned < 240  # 200 +- 4 sd


@pytest.mark.parametrize(("size", "most"), [(32, 4), (8, 1)])
def test_crop_shifts_by_up_to_an_eighth_and_fills_with_zeros(size: int, most: int) -> None:
    x = torch.zeros(1, 3, size, size)
    x[..., size // 2, size // 2] = 1
    seen = set()
    for n in range(600):
        y = dsa.crop(x, again(n))
        assert y.shape == x.shape and y.sum() == 3
        down, right = (int(v) - size // 2 for v in y[0, 0].nonzero()[0])
        seen.add((down, right))
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(-most, most + 1))
    assert (dsa.crop(torch.ones(1, 3, size, size), again(3)) == 0).any() or most == 1


def test_cutout_is_a_zero_square_of_half_the_side_cut_off_at_the_border() -> None:
    sides, firsts = Counter[int](), set[int]()
    for n in range(600):
        hole = dsa.cutout(torch.ones(2, 3, 32, 32), again(n)) == 0
        assert torch.equal(hole[0], hole[1]) and torch.equal(hole[0, 0], hole[0, 2])
        rows, columns = hole[0, 0].any(1), hole[0, 0].any(0)
        assert int(hole[0, 0].sum()) == int(rows.sum()) * int(columns.sum())  # a rectangle
        sides[int(rows.sum())] += 1
        first = int(rows.nonzero()[0])
        firsts.add(first)
        assert int(rows.sum()) == 16 or first == 0 or bool(rows[31])
    assert set(sides) == set(range(8, 17))
    assert firsts == set(
        range(25)
    )  # the centre lies anywhere from border to border, both included: rows 24 to 31 are the last
    assert sides[16] / 600 == pytest.approx(17 / 33, abs=0.09)


def test_color_is_brightness_saturation_contrast_by_three_draws() -> None:
    x = torch.randn(2, 3, 5, 5, generator=again(1), dtype=torch.float64)
    u = torch.rand(3, generator=again(7))
    bright = x + (u[0] - 0.5)
    grey = bright.mean(1, keepdim=True)
    saturated = grey + 2 * u[1] * (bright - grey)
    middle = saturated.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(dsa.color(x, again(7)), middle + (u[2] + 0.5) * (saturated - middle), atol=1e-12)


def test_scale_stretches_each_axis_by_its_own_factor() -> None:
    x, inside = ramps(), slice(8, 24)  # the middle never samples beyond the border
    low, high = 2.0, 0.0
    for n in range(200):
        y = dsa.scale(x, again(n))
        factors = [float((y[i, 0, inside, inside] / x[i, 0, inside, inside]).mean()) for i in (0, 1)]
        assert torch.allclose(y[0, 0, inside, inside], factors[0] * x[0, 0, inside, inside], atol=1e-5)
        assert torch.allclose(y[1, 0, inside, inside], factors[1] * x[1, 0, inside, inside], atol=1e-5)
        assert factors[0] != pytest.approx(factors[1], abs=1e-6)
        low, high = min(low, *factors), max(high, *factors)
    assert low + 1e-6 >= 1 / 1.2 and low < 0.85 and 1.18 < high < 1.2 + 1e-6


def test_rotate_turns_by_up_to_fifteen_degrees() -> None:
    x, inside, angles = ramps(), slice(10, 22), []
    for n in range(200):
        y = dsa.rotate(x, again(n))
        across, down = x[0, 0], x[1, 0]
        sine = float(y[1, 0, 16, 20] - y[1, 0, 16, 12]) / float(across[16, 20] - across[16, 12])
        angle = math.asin(sine)
        assert math.degrees(angle) == pytest.approx(30 * float(torch.rand((), generator=again(n))) - 15, abs=1e-3)
        turned = math.cos(angle) * across - sine * down
        assert torch.allclose(y[0, 0, inside, inside], turned[inside, inside], atol=1e-5)
        angles.append(math.degrees(angle))
    assert -15.001 < min(angles) < -14 and 14 < max(angles) < 15.001


def test_one_operation_a_call_each_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(name: str) -> Callable[[Tensor, torch.Generator], Tensor]:
        def operation(x: Tensor, generator: torch.Generator) -> Tensor:
            called.append(name)
            return x

        return operation

    monkeypatch.setattr(dsa, "OPERATIONS", {name: spy(name) for name in dsa.STRATEGY})
    for n in range(1200):
        dsa.siamese(torch.zeros(1, 3, 8, 8), again(n))
    counts = Counter(called)
    assert sum(counts.values()) == 1200 and set(counts) == set(dsa.STRATEGY)
    assert all(abs(v - 200) < 60 for v in counts.values())  # sd 13


@pytest.mark.parametrize("name", dsa.STRATEGY)
def test_all_images_of_a_batch_get_the_same_and_the_input_stays(name: str) -> None:
    """Siamese; and nothing is drawn from, or seeded in, torch's global stream."""
    one = torch.randn(1, 3, 8, 8, generator=again(0))
    x = one.repeat(3, 1, 1, 1)
    before, state = x.clone(), torch.random.get_rng_state()
    y = dsa.siamese(x, again(5), (name,))
    assert y.shape == x.shape and torch.equal(x, before)
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])
    assert torch.equal(y, dsa.siamese(x, again(5), (name,)))
    assert torch.equal(torch.random.get_rng_state(), state)
