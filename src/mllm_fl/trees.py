"""Trees: flat, named tensors. All that travels, is remembered by a client, or is checkpointed is a Tree.

No function here changes its arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]
SMALL = 1 << 16
"""Numbers up to which a leaf is summed together with others."""


def clone(a: Mapping[str, Tensor]) -> Tree:
    """A deep copy, detached; shapes and dtypes kept."""
    return {k: v.detach().clone() for k, v in a.items()}


def tree_map(f: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Tree:
    """Apply ``f`` leaf by leaf to trees of equal names."""
    return {k: f(*(t[k] for t in trees)) for k in trees[0]}


def prefixed(a: Mapping[str, Tensor], prefix: str) -> Tree:
    """The tree with ``prefix`` put before every name."""
    return {prefix + k: v for k, v in a.items()}


def under(a: Mapping[str, Tensor], prefix: str) -> Tree:
    """The leaves whose names begin with ``prefix``, with it taken off."""
    return {k.removeprefix(prefix): v for k, v in a.items() if k.startswith(prefix)}


def sq_dist(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Squared L2 distance over all leaves of ``a``, sum_k ||a_k - b_k||^2. Shape ()."""
    return torch.stack([(a[k] - b[k]).square().sum() for k in a]).sum()


def nbytes(a: Mapping[str, Tensor]) -> int:
    """Bytes of all leaves as they lie in memory: what one transmission of the tree costs."""
    return sum(v.numel() * v.element_size() for v in a.values())


def digest(a: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names: equal exactly for equal trees."""
    h = hashlib.sha256()
    for k in sorted(a):
        v = a[k].detach().contiguous().cpu()
        h.update(f"{k}|{v.dtype}|{tuple(v.shape)}|".encode())
        h.update(v.reshape(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b"")
    return h.hexdigest()


def weighted_mean(items: Iterable[tuple[float, Mapping[str, Tensor]]]) -> Tree:
    """sum_k p_k a_k with p_k = weight_k / sum of weights, in one pass; memory O(1) in the number of trees.

    Accumulates in float64 in the order given and casts back once, so that equal trees give the same tree
    bit for bit. Integer leaves (BatchNorm's batch counter) are rounded to nearest and stay integers.

    Raises:
        ValueError: no tree, or the weights sum to zero.
    """
    total = 0.0
    acc: Tree = {}
    dtypes: dict[str, torch.dtype] = {}
    room: Tree = {}  # for the terms of small leaves
    for weight, a in items:
        total += weight
        again = [k for k in a if k in room]
        for k, v in a.items():
            if k not in room:
                term = v.detach().to(torch.float64, copy=True).mul_(weight)
                if k in acc:
                    acc[k] += term
                else:
                    acc[k], dtypes[k] = term, v.dtype
        if again:  # the same products and sums in three calls in place of three a leaf
            terms = [room[k] for k in again]
            torch._foreach_copy_(terms, [a[k].detach() for k in again])
            torch._foreach_mul_(terms, weight)
            torch._foreach_add_([acc[k] for k in again], terms)
        room |= {k: torch.empty_like(acc[k]) for k in a if k not in room and acc[k].numel() <= SMALL}
    if not acc or total <= 0:
        raise ValueError("weighted_mean: no trees, or weights that sum to zero")
    return {
        k: (v / total).round_().to(dtypes[k]) if not dtypes[k].is_floating_point else (v / total).to(dtypes[k])
        for k, v in acc.items()
    }


def why_invalid(a: Mapping[str, Tensor], like: Mapping[str, Tensor], limit: float = 1e6) -> str | None:
    """Why ``a`` cannot stand in for ``like``, or None: names, shapes, dtypes, NaN, Inf, |value| > ``limit``."""
    if a.keys() != like.keys():
        return f"names differ: {sorted(a.keys() ^ like.keys())[:3]}"
    return _why_unlike(a, like) or why_not_finite({k: v for k, v in a.items() if v.dtype.is_floating_point}, limit)


def why_of_another_form(a: Mapping[str, Tensor], form: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Why ``a`` does not have this form, or None; values are not looked at, so the form's leaves may be on the meta device.

    ``form`` is {group: leaves}: the leaves of a group come together or not at all, those of the group "" always come, and there are no others.
    """
    leaves = {k: v for group in form.values() for k, v in group.items()}
    if surplus := sorted(a.keys() - leaves.keys()):
        return f"{surplus[0]}: not among what is sent"
    for name, group in form.items():
        missing = sorted(group.keys() - a.keys())
        if missing and (name == "" or len(missing) < len(group)):
            return f"{missing[0]}: missing"
    return _why_unlike(a, leaves)


def _why_unlike(a: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str | None:
    for k, v in a.items():
        if v.shape != like[k].shape:
            return f"{k}: shape {tuple(v.shape)} instead of {tuple(like[k].shape)}"
        if v.dtype != like[k].dtype:
            return f"{k}: dtype {v.dtype} instead of {like[k].dtype}"
    return None


def why_not_finite(a: Mapping[str, Tensor], limit: float = 1e6) -> str | None:
    """The first leaf that holds NaN, Inf or a value beyond ``limit`` in magnitude, in words, or None."""
    for k, v in a.items():
        if v.numel() == 0 or float(v.abs().max()) <= limit < float("inf"):  # NaN is not below anything
            continue
        if bool(torch.isnan(v).any()):
            return f"{k}: NaN"
        if bool(torch.isinf(v).any()):
            return f"{k}: Inf"
        top = float(v.abs().max())
        if top > limit:
            return f"{k}: magnitude {top:.3g} > {limit:g}"
    return None
