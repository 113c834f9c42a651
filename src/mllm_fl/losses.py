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


def focal(logits: Tensor, y: Tensor, gamma: float = 2.0, alpha: float = 1.0) -> Tensor:
    """Mean focal loss -alpha (1 - p_y)^gamma log p_y, Lin et al. 2017 (arXiv:1708.02002) eq. (5), scalar alpha. Shape ().

    1 - p_y is formed as -expm1(log p_y), which keeps loss and gradient finite and exact as p_y -> 1. ``gamma`` 0, ``alpha`` 1 is
    cross-entropy; for 0 < gamma < 1 the gradient's own factor (1 - p_y)^(gamma - 1) is bounded by the smallest 1 - p_y kept, 1e-12.
    """
    if gamma == 0:
        return alpha * cross_entropy(logits, y)
    log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)
    return -(alpha * (-torch.expm1(log_p)).clamp_min(1e-12) ** gamma * log_p).mean()


def weighted_cross_entropy(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """1/n sum_i a_{y_i} (-log p_{y_i}): class weights ``weights`` (C,), the batch mean not renormalised. Shape ().

    Wang et al. 2021 (arXiv:2008.06217), the ratio loss. (torch's own ``weight=`` divides by the sum of weights instead.)
    """
    return (weights[y] * F.cross_entropy(logits, y, reduction="none")).mean()


def distillation(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), mean over rows: Hinton et al. 2015 (arXiv:1503.02531) §2. Shape ().

    With T**2 its gradient with respect to the student's logits is T (p_T - q_T) / n. Both (n, C).
    """
    return temperature**2 * kl(teacher_logits, logits, temperature)


def ensemble_kl(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows of KL(target || softmax(logits)); ``target`` (n, C) are probabilities, zeros allowed. Shape ()."""
    rows: Tensor = (torch.special.xlogy(target, target) - target * F.log_softmax(logits, dim=1)).sum(1)
    return rows.mean()


def sharpened(p: Tensor, exponent: float) -> Tensor:
    """p_c^exponent / sum_c' p_c'^exponent, along the last dimension; exponent 1 is the identity. FedBE (arXiv:2009.01974) §4.3."""
    powered = p**exponent
    return powered / powered.sum(-1, keepdim=True)


def adjusted(logits: Tensor, prior: Tensor, tau: float = 1.0) -> Tensor:
    """logits + tau log prior, row by row; a prior of 0 counts as 1e-9. ``logits`` (n, C), ``prior`` (C,). Shape (n, C)."""
    return logits + tau * prior.clamp_min(1e-9).log()


def logit_adjusted(logits: Tensor, y: Tensor, prior: Tensor, tau: float = 1.0) -> Tensor:
    """Cross-entropy of logits + tau log prior, Menon et al. 2021 (arXiv:2007.07314) eq. (10). Shape ().

    ``prior`` (C,), positive where a class exists; a class with prior 0 is adjusted as if it had 1e-9, which shuts it off.
    """
    return F.cross_entropy(adjusted(logits, prior, tau), y)


def balanced_softmax(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """-log( n_y e^{z_y} / sum_c n_c e^{z_c} ), Ren et al. 2020 (arXiv:2007.10740) eq. (4). ``counts`` (C,). Shape ().

    A class that has no image drops out of the sum (log 0 = -inf), unlike logit adjustment with its floor.
    """
    return F.cross_entropy(logits + counts.to(logits.dtype).log(), y)
