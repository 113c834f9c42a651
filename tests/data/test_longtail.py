"""The long tail: counts, which images are kept, groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mllm_fl.data.longtail import achieved_imbalance, class_counts, groups, long_tail
from mllm_fl.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/lt_counts.json").read_text())


@pytest.mark.parametrize("setting", sorted(GOLDEN))
def test_the_six_cifar_settings_have_the_published_counts(setting: str) -> None:
    classes, imbalance = map(int, setting.split("_"))
    assert class_counts(50_000 // classes, classes, imbalance) == GOLDEN[setting]


def test_counts_are_truncated_not_rounded() -> None:
    assert class_counts(10, 3, 4) == [10, 5, 2]  # 10, 5.0, 2.5


@pytest.mark.parametrize("seed", [0, 7, 123])
def test_the_kept_images_are_those_of_the_globally_seeded_reference(seed: int) -> None:
    labels = np.array([0, 1, 2] * 20)
    np.random.seed(seed)  # the oracle is the protocol's own way to draw
    expected = []
    for c, n in enumerate([20, 10, 5]):
        indices = [i for i in range(60) if i % 3 == c]
        np.random.shuffle(indices)
        expected.append(indices[:n])
    assert long_tail(labels, 3, 4, seed) == expected


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    long_tail(np.array([0, 1] * 9), 2, 3, 7)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_an_unequal_source_is_first_cut_to_its_smallest_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 8, 30])
    assert [len(k) for k in long_tail(labels, 3, 4, 7)] == [8, 4, 2]


def test_imbalance_one_keeps_a_natural_tail_whole() -> None:
    labels = np.repeat([0, 1], [50, 8])
    assert [len(k) for k in long_tail(labels, 2, 1, 7)] == [50, 8]


def test_impossible_tails_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="use at most 20"):
        class_counts(20, 5, 21)
    with pytest.raises(UserError, match="below 1"):
        class_counts(20, 5, 0.5)
    with pytest.raises(UserError, match="class 1 has no training image"):
        long_tail(np.array([0, 2]), 3, 1, 7)


def test_groups_by_the_official_thresholds() -> None:
    found = groups([500, 101, 100, 20, 19, 1])
    assert (found.many, found.medium, found.few) == ((0, 1), (2, 3), (4, 5))
    assert found.rule.startswith("official")


def test_groups_fall_back_to_thirds_when_one_would_be_empty() -> None:
    found = groups([87, 4, 59, 40, 2, 27, 19, 13, 9, 6])  # nothing above 100
    assert (found.many, found.medium, found.few) == ((0, 2, 3), (5, 6, 7, 8), (1, 4, 9))
    assert found.rule.startswith("thirds")
    assert groups([87, 4], "official").many == ()
    with pytest.raises(UserError, match="unknown rule"):
        groups([1], "halves")


def test_achieved_imbalance_ignores_absent_classes() -> None:
    assert achieved_imbalance([50, 10, 0]) == 5
