"""Gradient descent on a Tree of weights: what a server does with images of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mllm_fl.trees import Tree, clone


def descend(
    w: Tree,
    names: Sequence[str],
    loss: Callable[[Tree, int], Tensor],
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    max_norm: float | None = None,
    anneal: bool = False,
    after: Callable[[Tree, int], None] | None = None,
) -> Tree:
    """``steps`` steps on the leaves ``names`` of a copy of ``w``; ``loss(w, step)`` is a scalar of the weights so far.

    ``optimiser`` makes a torch optimiser from the list of leaves. ``max_norm`` clips the gradient's norm. ``anneal``: the
    learning rate follows half a cosine to zero over the planned steps. ``after(w, step)`` sees the weights after each step.
    A forward pass in training mode moves the BatchNorm buffers of the copy. No step returns the copy unchanged.
    """
    out = clone(w)
    leaves = [out[k].requires_grad_(True) for k in names]
    if steps > 0:
        stepper = optimiser(leaves)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps) if anneal else None
        for i in range(steps):
            stepper.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(out, i), inputs=leaves)
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(leaves, max_norm)
            stepper.step()
            if schedule is not None:
                schedule.step()
            if after is not None:
                after(out, i)
    return {k: v.detach() for k, v in out.items()}


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """``steps`` batches of positions below ``count``: fresh permutations cut into pieces of ``size``, the last piece kept."""
    out: list[Tensor] = []
    while len(out) < steps:
        out += torch.randperm(count, generator=generator).split(size)
    return out[:steps]
