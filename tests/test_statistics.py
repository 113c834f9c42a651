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
