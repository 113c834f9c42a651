"""Losses against closed forms (MLLM-LLaVA-FL eq. 6, FedProx eq. 2)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllm_fl.losses import alignment, cross_entropy, kl, proximal


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(6, 4, generator=g, dtype=torch.float64),
        torch.tensor([0, 1, 2, 3, 0, 1]),
        torch.randn(6, 4, generator=g, dtype=torch.float64),
    )


def test_alignment_gradient_is_p_minus_y_plus_beta_p_minus_q(case: tuple[torch.Tensor, ...]) -> None:
    logits, y, teacher = case
    logits.requires_grad_(True)
    (grad,) = torch.autograd.grad(alignment(logits, y, teacher, beta=0.7), logits)
    p, q, onehot = logits.softmax(1), teacher.softmax(1), F.one_hot(y, 4)
    assert torch.allclose(grad, ((p - onehot) + 0.7 * (p - q)) / 6, atol=1e-14)


def test_alignment_is_cross_entropy_on_smoothed_labels_up_to_the_entropy_of_q(case: tuple[torch.Tensor, ...]) -> None:
    logits, y, teacher = case
    beta, q = 0.7, teacher.softmax(1)
    smoothed = (F.one_hot(y, 4) + beta * q) / (1 + beta)
    ce = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    entropy = -(q * q.log()).sum(1).mean()
    assert torch.allclose(alignment(logits, y, teacher, beta), (1 + beta) * ce - beta * entropy, atol=1e-14)


def test_beta_zero_is_cross_entropy(case: tuple[torch.Tensor, ...]) -> None:
    logits, y, teacher = case
    assert torch.equal(alignment(logits, y, teacher, 0.0), cross_entropy(logits, y))


def test_kl_has_its_direction() -> None:
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    q = sure.softmax(1)
    by_hand = (q * (q / 0.5).log()).sum()
    assert torch.allclose(kl(sure, unsure), by_hand)
    assert not torch.allclose(kl(sure, unsure), kl(unsure, sure))
    assert kl(sure, sure + 3.0).abs() < 1e-7  # a constant added to logits changes nothing


def test_proximal_by_hand() -> None:
    assert proximal({"a": torch.tensor([3.0, 4.0])}, {"a": torch.zeros(2)}, 0.1).item() == pytest.approx(
        1.25
    )  # 0.05 * 25
