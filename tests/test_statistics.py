"""Statistics with numbers that one can check by hand, and the cases where they usually break."""

from __future__ import annotations

import math

import pytest
import torch

from mllm_fl.statistics import effective_numbers, gaussian, moments, pooled_moments, ratio_weights, tau_normalised


def test_pooled_moments_are_those_of_the_union() -> None:
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    parts = [moments(p) for p in (x[:1], x[1:3], x[3:3], x[3:])]  # one image, two, none, many
    total, mean, covariance = pooled_moments(parts)
    assert total == 17
    assert torch.allclose(mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(covariance, torch.cov(x.T), rtol=1e-9)


def test_one_image_has_covariance_zero_and_no_image_is_an_error() -> None:
    n, mean, covariance = pooled_moments([moments(torch.tensor([[2.0, 3.0]]))])
    assert (n, mean.tolist(), covariance.abs().max().item()) == (1, [2.0, 3.0], 0.0)
    with pytest.raises(ValueError, match="no part has an image"):
        pooled_moments([moments(torch.zeros(0, 2))])


def test_gaussian_draws_have_the_moments_also_when_singular() -> None:
    a = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 2.0]], dtype=torch.float64)
    mean, covariance = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), a.T @ a  # rank 2 of 3
    x = gaussian(mean, covariance, 20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), mean, atol=0.1) and torch.allclose(torch.cov(x.T), covariance, atol=0.3)
    assert float((x[:, 0] + x[:, 1] - x[:, 2]).std()) < 1e-6  # stays in the plane


def test_tau_normalised_rows() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
    assert tau_normalised(w, 0) is w
    assert torch.allclose(tau_normalised(w, 1), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(tau_normalised(w, 0.5)[2], torch.tensor([0.0, 2 / math.sqrt(2)]))


def test_ratio_weights_by_hand() -> None:
    """Entry 0 belongs to class 0 alone, entry 1 is claimed by two (0.9 > 0.8), entry 2 belongs to class 1."""
    changes = torch.tensor([[2.0, 1.0, -0.5], [-1.0, 0.9, 3.0], [0.0, 0.0, 0.5]])
    r0 = 2.0 / abs((-1.0 + 0.0) / 2)
    assert ratio_weights(changes).tolist()[:2] == pytest.approx(
        [1 + 0.1 * r0, 1 + 0.1 * 10]
    )  # class 1: mean of -0.5 and 0.5 is 0
    assert ratio_weights(changes).tolist()[2] == pytest.approx(1 + 0.1 * 10)  # class 2 owns no entry: 0 / 0
    assert torch.allclose(ratio_weights(changes), ratio_weights(changes * 7))
    assert ratio_weights(changes, cap=2.0).tolist()[0] == pytest.approx(1.2)
    assert ratio_weights(changes, dominance=0.95).tolist()[0] != pytest.approx(1 + 0.1 * r0)  # entry 1 now counts


def test_effective_numbers_by_hand() -> None:
    """Two opposite features cancel: the bound 1e-6; two equal directions cannot be, they are centred; one image counts one."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]])
    y = torch.tensor([0, 0, 1])
    e = effective_numbers(features, y, 3, [torch.tensor([0, 1, 2])])
    assert e.tolist() == pytest.approx([1e6, 1.0, 0.0])
    three = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    e = effective_numbers(three, torch.zeros(3, dtype=torch.int64), 1, [torch.arange(3)])
    assert e.item() == pytest.approx(9.0)  # unit vectors 1, -1, -1: mean -1/3


def test_moments_are_taken_in_float64() -> None:
    """10000 and 10000.001 in float32 are two numbers; their variance is lost unless they are widened first."""
    x = torch.tensor([[10000.0], [10000.0009765625]])  # one unit in the last place apart
    _, mean, covariance = moments(x)
    assert mean.dtype == covariance.dtype == torch.float64
    assert float(covariance) == pytest.approx(0.0009765625**2 / 2, rel=1e-6)
    n, nothing, zero = moments(torch.zeros(0, 2))
    assert (n, nothing.dtype, nothing.tolist(), zero.tolist()) == (
        0,
        torch.float64,
        [0.0, 0.0],
        [[0.0, 0.0], [0.0, 0.0]],
    )


def test_pooling_loses_no_digits_far_from_zero_and_widens_float32() -> None:
    """Values about 1e8: written with means' products instead of centred ones, the variance of 1 would be off by tens of per cent."""
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e8 / 3
    _, _, covariance = pooled_moments([moments(x[:13]), moments(x[13:])])
    assert float(covariance) == pytest.approx(float(torch.var(x)), rel=1e-6)
    a, b, c = (float(torch.tensor(v)) for v in (0.1, 0.3, 0.7))  # as float32 has them
    parts = [(4, torch.tensor([a]), torch.tensor([[c]])), (1, torch.tensor([b]), torch.tensor([[0.0]]))]
    total, mean, spread = pooled_moments(parts)
    assert mean.dtype == spread.dtype == torch.float64
    middle = (4 * a + b) / 5
    assert total == 5
    assert float(mean) == pytest.approx(middle, rel=1e-14)
    assert float(spread) == pytest.approx((3 * c + 4 * (a - middle) ** 2 + (b - middle) ** 2) / 4, rel=1e-14)


def test_two_images_of_two_clients() -> None:
    """0 and 2: mean 1, variance (1 + 1) / (2 - 1) = 2."""
    parts = [moments(torch.tensor([[0.0]])), moments(torch.tensor([[2.0]]))]
    assert [float(v) for v in pooled_moments(parts)] == [2.0, 1.0, 2.0]


def test_ratio_sums_small_differences_in_float64() -> None:
    """Class 1 moves 1e8, 1 and -1e8: their sum is 1, in float32 it would be 0 and the ratio the value of an empty one, 10."""
    changes = torch.tensor([[2e8, 3.0, 2e8], [1e8, 1.0, -1e8]])
    assert float(ratio_weights(changes, 0.0, 1.0)[0]) == 5000.0
