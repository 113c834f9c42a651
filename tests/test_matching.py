"""Gradient matching and prototype contrast: closed forms against autograd, the fused server against the plain one, limits by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.algorithms.base import Update
from mllm_fl.matching import (
    class_gradients,
    feature_match,
    fresh_head,
    gathering,
    gradient_distance,
    head_gradient,
    matching_gradient,
    mean_gradients,
    prototype_contrast,
    prototype_contrast_gradient,
    retrain_head,
)
from mllm_fl.seeds import stream
from tests import plain_matching as plain


class Case(NamedTuple):
    features: Tensor  # (C * n, d)
    labels: Tensor
    weight: Tensor
    bias: Tensor
    grad_weights: Tensor  # (C, C, d)
    grad_biases: Tensor
    texts: Tensor


def case(classes: int = 4, n: int = 5, d: int = 6, dtype: torch.dtype = torch.float64) -> Case:
    """Random features of each class, a head, and its gradients on other, non-negative features ("real" ones)."""
    g = torch.Generator().manual_seed(3)
    weight, bias = (v.to(dtype) for v in fresh_head(torch.empty(classes, d), g))
    real = torch.randn(classes, 7, d, generator=g, dtype=dtype).relu()
    found = [head_gradient(real[c], torch.full((7,), c), weight, bias) for c in range(classes)]
    return Case(
        torch.randn(classes * n, d, generator=g, dtype=dtype), torch.arange(classes).repeat_interleave(n), weight, bias,
        torch.stack([w for w, _ in found]), torch.stack([b for _, b in found]),
        F.normalize(torch.randn(classes, d, generator=g, dtype=dtype), dim=1),
    )  # fmt: skip


def test_head_gradient_by_hand() -> None:
    """Two classes, a zero head: p = (1/2, 1/2), so that class 0 is pulled up by half the mean feature, class 1 down by as much."""
    features = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    w, b = head_gradient(features, torch.tensor([0, 0]), torch.zeros(2, 2), torch.zeros(2))
    assert w.tolist() == [[-0.5, -1.0], [0.5, 1.0]]
    assert b.tolist() == [-0.5, 0.5]


def test_head_gradient_is_autograds_and_that_of_finite_differences() -> None:
    a = case()
    w, b = head_gradient(a.features, a.labels, a.weight, a.bias)
    head = [a.weight.clone().requires_grad_(), a.bias.clone().requires_grad_()]
    by_autograd = torch.autograd.grad(F.cross_entropy(F.linear(a.features, *head), a.labels), head)
    assert torch.allclose(w, by_autograd[0], atol=1e-15) and torch.allclose(b, by_autograd[1], atol=1e-15)
    step = torch.zeros_like(a.weight)
    step[1, 2] = 1e-5
    up, down = (F.cross_entropy(F.linear(a.features, a.weight + s, a.bias), a.labels) for s in (step, -step))
    assert float((up - down) / 2e-5) == pytest.approx(float(w[1, 2]), abs=1e-9)


def test_rows_of_own_and_other_classes_point_apart_for_features_that_are_not_negative() -> None:
    a = case()
    for c in range(4):
        assert (a.grad_weights[c, c] <= 0).all() and a.grad_biases[c, c] < 0
        assert (a.grad_weights[c, torch.arange(4) != c] >= 0).all()


def test_distance_by_hand() -> None:
    """Equal rows count 0, opposite rows 2, rows at a right angle 1; the bias is one row."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    ones = torch.ones(3)
    assert float(gradient_distance(a, ones, b, ones)) == pytest.approx(0 + 2 + 1 + 0, abs=1e-5)
    assert float(gradient_distance(a, ones, b, -ones)) == pytest.approx(0 + 2 + 1 + 2, abs=1e-5)
    tiny = torch.tensor([1e-3, 0.0])  # a product of norms of 1e-6 is halved by the 1e-6 beside it
    assert float(gradient_distance(tiny[None], tiny, tiny[None], tiny)) == pytest.approx(1.0, abs=1e-5)


def test_distance_lies_between_its_bounds_and_forgets_scale() -> None:
    a = case()
    got = [head_gradient(a.features[a.labels == c], torch.full((5,), c), a.weight, a.bias) for c in range(4)]
    w, b = torch.stack([x for x, _ in got]), torch.stack([x for _, x in got])
    d = gradient_distance(w, b, a.grad_weights, a.grad_biases)
    assert d.shape == (4,) and (d > 0).all() and (d < 2 * 5).all()
    for c in range(4):
        wanted = plain.distance((w[c], b[c]), (a.grad_weights[c], a.grad_biases[c]))
        assert torch.allclose(d[c], wanted, atol=1e-14)
    scaled = gradient_distance(w, b, 1000 * a.grad_weights, 1000 * a.grad_biases)
    assert torch.allclose(d, scaled, atol=1e-2)  # the 1e-6 beside the product of norms is all that scale can move
    opposite = gradient_distance(w * 1e6, b * 1e6, -w, -b)
    assert torch.allclose(opposite, torch.full((4,), 10.0, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(gradient_distance(w * 1e6, b * 1e6, w, b), torch.zeros(4, dtype=torch.float64), atol=1e-6)


def test_matching_gradient_is_autograd_through_autograd() -> None:
    a = case()
    leaf = a.features.clone().requires_grad_()
    losses = [
        plain.distance(
            plain.query(leaf[a.labels == c], c, a.weight, a.bias, twice=True), (a.grad_weights[c], a.grad_biases[c])
        )
        for c in range(4)
    ]
    (wanted,) = torch.autograd.grad(torch.stack(losses).sum(), leaf)
    x = a.features.view(4, 5, 6)
    got = matching_gradient(x, torch.arange(4), a.weight, a.bias, a.grad_weights, a.grad_biases)
    assert torch.allclose(got.view_as(wanted), wanted, atol=1e-13)
    some = matching_gradient(
        x[[3, 1]], torch.tensor([3, 1]), a.weight, a.bias, a.grad_weights[[3, 1]], a.grad_biases[[3, 1]]
    )
    assert torch.allclose(some, got[[3, 1]], atol=1e-15)


def test_matching_gradient_is_finite_where_a_gradient_vanishes() -> None:
    """A head so sure that p = e_c: the features' gradient is 0, and so is what they are told."""
    x = torch.full((1, 3, 2), 10.0)
    weight, bias = torch.tensor([[50.0, 50.0], [-50.0, -50.0]]), torch.zeros(2)
    targets = torch.ones(1, 2, 2), torch.ones(1, 2)
    assert (matching_gradient(x, torch.tensor([0]), weight, bias, *targets) == 0).all()


def test_matching_goes_downhill_and_the_real_features_are_its_end() -> None:
    a = case(d=12)

    def loss(features: Tensor) -> float:
        got = [head_gradient(features[a.labels == c], torch.full((5,), c), a.weight, a.bias) for c in range(4)]
        w, b = torch.stack([x for x, _ in got]), torch.stack([x for _, x in got])
        return float(gradient_distance(w, b, a.grad_weights, a.grad_biases).sum())

    seen = torch.arange(4)
    falling = [
        loss(feature_match(a.features, a.labels, seen, a.grad_weights, a.grad_biases, a.weight, a.bias, steps=s))
        for s in (0, 10, 30, 100)
    ]
    assert falling[0] == pytest.approx(loss(a.features))
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.5 * falling[0]
    own = [head_gradient(a.features[a.labels == c], torch.full((5,), c), a.weight, a.bias) for c in range(4)]
    at_end = feature_match(
        a.features, a.labels, seen, torch.stack([w for w, _ in own]), torch.stack([b for _, b in own]), a.weight, a.bias
    )
    assert torch.allclose(at_end, a.features, atol=1e-3)  # D is 0 there but for the 1e-6 in the cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_matching_is_the_plain_one(dtype: torch.dtype) -> None:
    a = case(dtype=dtype)
    seen = torch.tensor([0, 2, 3])
    grads = {int(c): (a.grad_weights[c], a.grad_biases[c]) for c in seen}
    got = feature_match(
        a.features, a.labels, seen, a.grad_weights[seen], a.grad_biases[seen], a.weight, a.bias, steps=100, lr=0.1
    )
    wanted = plain.feature_match(a.features, a.labels, grads, a.weight, a.bias, steps=100, lr=0.1)
    assert torch.allclose(got, wanted, atol=1e-3 if dtype == torch.float32 else 1e-10)  # rounding of 100 steps
    assert torch.equal(got[a.labels == 1], a.features[a.labels == 1])  # unseen
    assert not torch.allclose(got[a.labels == 2], a.features[a.labels == 2], atol=0.1)


def test_features_need_not_be_sorted_by_class() -> None:
    a = case()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([3, 0])
    args = seen, a.grad_weights[seen], a.grad_biases[seen], a.weight, a.bias
    straight = feature_match(a.features, a.labels, *args, steps=7)
    assert torch.allclose(
        feature_match(a.features[order], a.labels[order], *args, steps=7), straight[order], atol=1e-12
    )


def test_fused_matching_with_contrast_is_the_plain_one() -> None:
    """With the pull, unseen classes move too."""
    a = case()
    seen = torch.tensor([0, 2])
    grads = {int(c): (a.grad_weights[c], a.grad_biases[c]) for c in seen}
    got = feature_match(
        a.features, a.labels, seen, a.grad_weights[seen], a.grad_biases[seen], a.weight, a.bias, steps=30, lr=0.1,
        pull=lambda f, y: 0.2 * prototype_contrast_gradient(f, y, a.texts, 0.3, 5),
    )  # fmt: skip
    wanted = plain.feature_match(
        a.features, a.labels, grads, a.weight, a.bias, steps=30, lr=0.1, texts=a.texts, contrast=0.2, temperature=0.3
    )
    assert torch.allclose(got, wanted, atol=1e-10)
    assert not torch.allclose(got[a.labels == 1], a.features[a.labels == 1], atol=1e-3)


@pytest.mark.parametrize("n", [5, 8])  # 20 features in batches of 8 leave a last one of 4; 32 leave none
def test_fused_head_is_the_plain_one(n: int) -> None:
    a = case(n=n)
    got = retrain_head(a.features, a.labels, a.weight, a.bias, stream(0, "b"), epochs=20, lr=0.1, batch=8)
    wanted = plain.retrain_head(a.features, a.labels, a.weight, a.bias, stream(0, "b"), epochs=20, lr=0.1, batch=8)
    assert torch.allclose(got[0], wanted[0], atol=1e-12) and torch.allclose(got[1], wanted[1], atol=1e-12)
    assert not torch.allclose(got[0], a.weight, atol=0.1)


def test_a_retrained_head_knows_separable_features() -> None:
    g = stream(0, "x")
    labels = torch.arange(3).repeat_interleave(20)
    features = 3 * F.one_hot(labels, 3) + 0.3 * torch.randn(60, 3, generator=g)
    weight, bias = retrain_head(features, labels, *fresh_head(torch.empty(3, 3), g), g)
    assert (F.linear(features, weight, bias).argmax(1) == labels).all()


def test_a_fresh_head_fills_its_range() -> None:
    weight, bias = fresh_head(torch.empty(50, 16), stream(0, "x"))
    both = torch.cat([weight.flatten(), bias])
    assert weight.shape == (50, 16) and bias.shape == (50,)
    assert 0.24 < float(both.max()) < 0.25 and -0.25 <= float(both.min()) < -0.24  # 1 / sqrt(16)
    assert float(both.std()) == pytest.approx(0.5 / math.sqrt(12), rel=0.1)


def test_contrast_is_the_masked_supervised_contrastive_loss() -> None:
    a = case()
    assert torch.allclose(
        prototype_contrast(a.features, a.labels, a.texts, 0.1, copies=5),
        plain.supervised_contrast(a.features, a.labels, a.texts, 0.1),
        atol=1e-12,
    )


def test_contrast_by_hand() -> None:
    """One feature on its own text, another at a right angle, two copies: s = (1, 0), 1 e^1 + 2 e^0."""
    loss = prototype_contrast(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.eye(2), temperature=1.0, copies=2)
    assert float(loss) == pytest.approx(math.log(math.e + 2) - 1)


def test_contrast_gradient_is_autograds() -> None:
    a = case()
    leaf = a.features.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(prototype_contrast(leaf, a.labels, a.texts, 0.2, 5), leaf)
    assert torch.allclose(prototype_contrast_gradient(a.features, a.labels, a.texts, 0.2, 5), wanted, atol=1e-14)


def test_a_single_copy_leaves_only_the_other_classes_below_the_line() -> None:
    """M = 1: the own text's only copy is masked out; the loss stays finite."""
    a = case()
    s = a.features @ a.texts.T / 0.5
    others = s.masked_fill(F.one_hot(a.labels, 4).bool(), -math.inf)
    wanted = (others.logsumexp(1) - s.gather(1, a.labels[:, None])[:, 0]).mean()
    assert torch.allclose(prototype_contrast(a.features, a.labels, a.texts, 0.5, 1), wanted)
    assert torch.isfinite(prototype_contrast_gradient(a.features, a.labels, a.texts, 0.5, 1)).all()


def test_class_gradients_are_means_over_repeats_and_name_the_classes_that_are_there() -> None:
    a = case()
    images = torch.randn(6, 6, generator=stream(0, "x"), dtype=torch.float64)
    labels, asked = torch.tensor([2, 0, 2, 2, 0, 2]), []

    def feature_of(positions: list[int], draws: torch.Generator) -> Tensor:
        asked.append(positions)
        return images[positions] + torch.rand((), generator=draws)

    def named(purpose: str) -> torch.Generator:
        return stream(1, purpose)

    got = class_gradients(labels, feature_of, named, a.weight, a.bias, repeats=3, images=3)
    assert sorted(got) == ["grad/0/bias", "grad/0/weight", "grad/2/bias", "grad/2/weight"]
    assert [len(p) for p in asked] == [2, 2, 2, 3, 3, 3]
    assert all(set(p) <= {1, 4} for p in asked[:3]) and all(set(p) <= {0, 2, 3, 5} for p in asked[3:])
    assert all(len(set(p)) == len(p) for p in asked) and len({tuple(sorted(p)) for p in asked[3:]}) > 1
    draws = named("dsa/2")
    shifts = [torch.rand((), generator=draws) for _ in range(3)]
    each = [
        head_gradient(images[p] + u, torch.full((3,), 2), a.weight, a.bias)
        for p, u in zip(asked[3:], shifts, strict=True)
    ]
    assert torch.allclose(got["grad/2/weight"], sum(w for w, _ in each) / torch.tensor(3.0), atol=1e-15)
    assert torch.allclose(got["grad/2/bias"], sum(b for _, b in each) / torch.tensor(3.0), atol=1e-15)
    alone = class_gradients(labels[labels == 2], lambda p, g: feature_of([[0, 2, 3, 5][i] for i in p], g), named,
                            a.weight, a.bias, repeats=3, images=3)  # fmt: skip
    assert torch.equal(alone["grad/2/weight"], got["grad/2/weight"])  # whichever other classes are there


def test_mean_gradients_are_unweighted_over_those_that_answered() -> None:
    def answer(c: int, value: float) -> dict[str, Tensor]:
        return {f"grad/{c}/weight": torch.full((3, 2), value), f"grad/{c}/bias": torch.full((3,), -value)}

    sums: dict[str, tuple[int, Tensor]] = {}
    sent = [answer(0, 1.0) | answer(2, 5.0), answer(2, 7.0), {}, answer(2, 0.0), answer(9, 1.0)]
    updates = [Update(k, {}, 1.0, each, {}) for k, each in enumerate(sent)]
    assert list(gathering(updates, sums)) == updates
    means = mean_gradients(sums, 3)
    assert means is not None
    seen, weights, biases = means
    assert seen.tolist() == [0, 2]
    assert weights[:, 0, 0].tolist() == [1.0, 4.0] and biases[:, 0].tolist() == [-1.0, -4.0]
    assert weights.shape == (2, 3, 2) and biases.dtype == torch.float32
    assert mean_gradients({}, 3) is None


def test_a_fresh_head_owns_its_memory() -> None:
    """Weight and bias are drawn together and kept apart: no leaf of the server's state is a view of another."""
    weight, bias = fresh_head(torch.zeros(3, 5), stream(0, "x"))
    assert weight.is_contiguous() and bias.is_contiguous()
    assert (weight.untyped_storage().nbytes(), bias.untyped_storage().nbytes()) == (3 * 5 * 4, 3 * 4)
