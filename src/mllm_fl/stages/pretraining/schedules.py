"""How alpha and the learning rate move over the steps of stage 1b; neither depends on the other, unless ``drive = "alpha"`` says so."""

from __future__ import annotations

import math

from mllm_fl.stages.pretraining.config import PretrainConfig


def alpha_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Weight of the compact model in eq. (2) at step 0, 1, ... of S: the paper's is (1 - cos(pi s / R)) / 2 until R = S / 2, then 1."""
    if config.alpha in ("one", "none", "zero"):
        return float(config.alpha != "zero")
    if config.alpha == "constant":
        return config.alpha_value
    rise = config.alpha_until * steps
    if step >= rise:
        return 1.0
    if config.alpha == "stepwise":
        return math.floor(config.alpha_levels * step / rise) / config.alpha_levels
    return 0.5 * (1 - math.cos(math.pi * step / rise)) if config.alpha == "paper" else step / rise


def lr_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up over the first ``warmup`` of the steps, then half a cosine towards 0.

    With W warm-up steps of S: lr (s + 1) / W, which is lr itself in step W - 1, then lr (1 + cos(pi (s - W) / (S - W))) / 2, which begins
    with lr and would be 0 in step S, one after the last. (The Trainer of LLaVA's script begins with a step at 0 instead.) ``schedule``
    may be a straight line to the same 0, or stay at lr. With ``drive = "alpha"`` all of it is multiplied by alpha.
    """
    warm = math.ceil(config.warmup * steps)
    at = (step - warm) / max(steps - warm, 1)
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * at)), "linear": 1 - at, "constant": 1.0}
    rate = config.lr * ((step + 1) / warm if step < warm else falls[config.schedule])
    return rate * alpha_at(config, step, steps) if config.drive == "alpha" else rate
