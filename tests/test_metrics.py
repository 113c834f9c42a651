"""Accuracies by hand, and the several numbers that one curve can be quoted with."""

from __future__ import annotations

import pytest
import torch

from mllm_fl.data.longtail import Groups
from mllm_fl.metrics import SCORES, Calibration, Confusion, Evaluation, forgetting, per_client, summarise


def test_scores_by_hand() -> None:
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 0, 0])
    c = Confusion.of(y[:3], predicted[:3], 4) + Confusion.of(y[3:], predicted[3:], 4)
    assert c.counts.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    s = c.scores(Groups("by hand", (0,), (1, 2), (3,)))
    assert s["accuracy"] == 4 / 7
    assert s["per_class"] == [0.75, 0.5, 0.0, None]
    assert s["class_weighted"] == pytest.approx(1.25 / 3)
    assert (s["many"], s["medium"], s["few"]) == (0.75, 0.25, None)


def test_agrees_with_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(3)
    y, p = torch.randint(0, 5, (200,), generator=g), torch.randint(0, 5, (200,), generator=g)
    c = Confusion.of(y, p, 5)
    assert (c.counts.numpy() == sk.confusion_matrix(y, p)).all()
    s = c.scores(None)
    assert s["accuracy"] == pytest.approx(sk.accuracy_score(y, p))
    assert s["class_weighted"] == pytest.approx(sk.balanced_accuracy_score(y, p))


def test_last_mean_maximum_and_ema_by_hand() -> None:
    s = summarise([(1, 0.2), (2, 0.6), (3, 0.4)], last=2, decay=0.5)
    assert s["mean_last"] == {"rounds": 2, "n": 2, "mean": pytest.approx(0.5), "sd": pytest.approx(0.2**0.5 / 10**0.5)}
    assert s["max"] == {"accuracy": 0.6, "round": 2, "note": "selected on test"}
    assert s["ema"]["accuracy"] == pytest.approx(0.4)  # 0.2 -> 0.4 -> 0.4


def test_one_round_has_no_spread_and_no_curve_no_number() -> None:
    assert summarise([(1, 0.5)])["mean_last"]["sd"] is None
    assert summarise([])["max"] is None


def logits_of(confidence: list[float]) -> torch.Tensor:
    """Two-class logits that predict class 0 with these confidences (above one half)."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], 1)


def test_calibration_by_hand() -> None:
    logits, y = logits_of([0.9, 0.9, 0.9, 0.6]), torch.tensor([0, 0, 1, 1])
    ece = Calibration.of(y, logits).ece()  # 3/4 |2/3 - 0.9| + 1/4 |0 - 0.6|
    assert ece == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6, abs=1e-9)
    assert Calibration.of(y[:0], logits[:0]).ece() is None
    certain = Calibration.of(y[:2], torch.tensor([[1e4, 0.0], [0.0, 1e4]]))
    assert certain.images.tolist() == [0] * 14 + [2] and certain.ece() == 0.5
    assert Calibration.of(y[:1], torch.tensor([[float("nan"), 0.0]])).images.tolist() == [1] + [0] * 14


def test_an_edge_belongs_to_the_bin_below_it() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4], [0.6000001, 0.3999999]], dtype=torch.float64))
    assert Calibration.of(torch.tensor([0, 0]), logits, bins=5).images.tolist() == [0, 0, 1, 1, 0]


def test_calibration_agrees_with_bins_of_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.calibration")
    g = torch.Generator().manual_seed(5)
    logits, y = 2 * torch.randn(4000, 6, generator=g), torch.randint(0, 6, (4000,), generator=g)
    share, predicted = torch.softmax(logits.double(), 1).max(1)
    right = (predicted == y).numpy()
    accuracy, confidence = sk.calibration_curve(right, share.numpy(), n_bins=15, strategy="uniform")
    counts = [n for n in Calibration.of(y, logits).images.tolist() if n]
    ours = Calibration.of(y, logits).ece()
    theirs = sum(n * abs(a - c) for n, a, c in zip(counts, accuracy, confidence, strict=True)) / 4000
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_adding_evaluations_in_any_order_gives_equal_bits() -> None:
    g = torch.Generator().manual_seed(1)
    logits, y = torch.randn(300, 4, generator=g), torch.randint(0, 4, (300,), generator=g)
    parts = [Evaluation.of(y[i : i + 37], logits[i : i + 37]) for i in range(0, 300, 37)]
    whole = Evaluation.of(y, logits).scores(None)
    assert tuple(whole) == SCORES
    assert sum(parts, Evaluation.none(4)).scores(None) == whole == sum(parts[::-1], Evaluation.none(4)).scores(None)
    assert whole["accuracy"] == float((logits.argmax(1) == y).double().mean())


def test_clients_are_worth_their_own_mixture_of_classes() -> None:
    found = per_client([1.0, 0.5, None], [[3, 1, 0], [0, 2, 7], [0, 0, 4], [0, 0, 0]])
    assert found["each"] == [0.875, 0.5, None, None]
    assert (found["mean"], found["worst_decile"]) == (0.6875, 0.5)
    twenty = per_client([0.0, 1.0], [[20 - k, k] for k in range(20)])
    assert twenty["worst_decile"] == pytest.approx((0 + 1 / 20) / 2)  # the worst two of twenty


def test_forgetting_is_the_distance_to_the_best_so_far() -> None:
    found = forgetting([[0.2, 0.9, None], [0.8, 0.6, None], [0.5, 0.7, None]])
    assert found["per_class"] == [pytest.approx(0.3), pytest.approx(0.2), None]
    assert found["mean"] == pytest.approx(0.25)
    assert forgetting([[0.1, 0.2]])["mean"] == 0.0 and forgetting([]) == {"mean": None, "per_class": []}
