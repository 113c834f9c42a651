"""Accuracies by hand, and the several numbers that one curve can be quoted with."""

from __future__ import annotations

import pytest
import torch

from mllm_fl.data.longtail import Groups
from mllm_fl.metrics import Confusion, summarise


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
