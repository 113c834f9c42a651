"""Losses, as pure functions of tensors, each with its equation and source. Probabilities are never formed when logs suffice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy -1/n sum_i log softmax(logits_i)[y_i]. ``logits`` (n, C), ``y`` (n,) int64. Shape ()."""
    return F.cross_entropy(logits, y)


def kl(target_logits: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over rows of KL(q || p), q = softmax(target/T), p = softmax(logits/T). Both (n, C). Shape ().

    The target is the first argument of the divergence, as written in MLLM-LLaVA-FL, eq. (6); no T**2 factor.
    """
    log_q = F.log_softmax(target_logits / temperature, dim=1)
    log_p = F.log_softmax(logits / temperature, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()


def alignment(logits: Tensor, y: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """L_align = CE(y, p) + beta * KL(q || p), MLLM-LLaVA-FL (arXiv:2409.06067) eq. (6). Shape ().

    At temperature 1 the gradient with respect to the logits of one row is (p - y) + beta (p - q).
    """
    ce = cross_entropy(logits, y)
    return ce if beta == 0 else ce + beta * kl(teacher_logits, logits, temperature)


def proximal(params: dict[str, Tensor], anchor: dict[str, Tensor], mu: float) -> Tensor:
    """(mu / 2) ||w - w^t||^2 over the trainable parameters, FedProx (arXiv:1812.06127) eq. (2). Shape ()."""
    return (mu / 2) * torch.stack([(params[k] - anchor[k].detach()).square().sum() for k in params]).sum()
