"""Descent on a Tree: plain numbers, nothing mutated, buffers move, schedules and clipping are seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mllm_fl.descent import batches, descend
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, digest

SGD = partial(torch.optim.SGD, lr=0.5)


def slope(w: Tree, step: int) -> Tensor:
    return 2.0 * w["a"].sum() + 0 * w["b"].sum()


def test_steps_by_hand_and_nothing_mutated() -> None:
    w = {"a": torch.tensor([1.0]), "b": torch.tensor([4.0])}
    before = digest(w)
    assert descend(w, ["a"], slope, SGD, 3)["a"].tolist() == [1.0 - 3 * 0.5 * 2.0]
    assert digest(descend(w, ["a"], slope, SGD, 0)) == before == digest(w)
    assert descend(w, ["a"], slope, SGD, 1)["b"].tolist() == [4.0]


def test_clipping_annealing_and_what_is_seen_after_each_step() -> None:
    w = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert descend(w, ["a"], slope, SGD, 1, max_norm=1.0)["a"].item() == pytest.approx(
        -0.5
    )  # torch divides by norm + 1e-6
    seen: list[float] = []
    descend(w, ["a"], slope, SGD, 2, anneal=True, after=lambda v, i: seen.append(v["a"].item()))
    assert seen == [-1.0, -1.5]  # lr 0.5, then half of it at half of the cosine


def test_batches_are_permutations_cut_into_pieces() -> None:
    found = batches(5, 2, 7, torch.Generator().manual_seed(0))
    assert [len(b) for b in found] == [2, 2, 1, 2, 2, 1, 2]
    assert sorted(torch.cat(found[:3]).tolist()) == sorted(torch.cat(found[3:6]).tolist()) == [0, 1, 2, 3, 4]
    assert torch.cat(found[:3]).tolist() != torch.cat(found[3:6]).tolist()
    assert batches(5, 2, 0, torch.Generator()) == []


def test_a_leaf_that_a_step_does_not_reach_stands_still() -> None:
    """b is in the loss of step 0 alone: one step of 0.1, and momentum does not carry it on."""
    w = {"a": torch.zeros(1), "b": torch.zeros(1)}

    def loss(v: Tree, step: int) -> Tensor:
        return v["a"].sum() if step else (v["a"] + v["b"]).sum()

    got = descend(w, ["a", "b"], loss, partial(torch.optim.SGD, lr=0.1, momentum=0.9), 3)
    assert float(got["b"]) == pytest.approx(-0.1)
    assert float(got["a"]) == pytest.approx(-0.1 * (1 + 1.9 + 2.71))


def test_no_permutation_is_drawn_that_no_batch_needs() -> None:
    """Two batches of two from four positions are one permutation: the stream goes on with its second."""
    g, again = stream(0, "x"), stream(0, "x")
    batches(4, 2, 2, g)
    torch.randperm(4, generator=again)
    assert torch.equal(torch.randperm(50, generator=g), torch.randperm(50, generator=again))


def test_what_else_the_loss_is_made_of_gets_no_gradient() -> None:
    """The network's own parameters require gradients; they are no leaves of the descent."""
    outside = torch.ones(1, requires_grad=True)
    descend({"a": torch.zeros(1)}, ["a"], lambda v, step: (v["a"] * outside).sum(), SGD, 2)
    assert outside.grad is None
