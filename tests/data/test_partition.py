"""Partitions: golden histograms of all six CIFAR settings, and properties that hold for every seed."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mllm_fl.data.longtail import long_tail
from mllm_fl.data.partition import Partition, _cut, _group, creff, dirichlet, iid, partition
from mllm_fl.errors import UserError


def golden() -> dict[tuple[str, int], np.ndarray]:
    """Client by class counts of seed 7, alpha 0.5, keyed by (dataset, imbalance)."""
    out: dict[tuple[str, int], np.ndarray] = {}
    with (Path(__file__).parents[1] / "fixtures/creff_seed7_client_histograms.csv").open() as file:
        for row in csv.DictReader(file):
            key = row["dataset"], int(row["imbalance_factor"])
            table = out.setdefault(key, np.zeros((20, int(row["dataset"].removeprefix("cifar"))), dtype=int))
            table[int(row["client"]), int(row["class"])] = int(row["count"])
    return out


GOLDEN = golden()


@pytest.mark.parametrize("setting", sorted(GOLDEN), ids=lambda s: f"{s[0]}-{s[1]}")
def test_creff_gives_the_golden_histograms(setting: tuple[str, int]) -> None:
    expected = GOLDEN[setting]
    classes = expected.shape[1]
    labels = np.repeat(np.arange(classes), 50_000 // classes)
    clients = creff(long_tail(labels, classes, setting[1], 7), 20, 0.5, 7)
    found = np.array([np.bincount(labels[held], minlength=classes) for held in clients])
    assert len(GOLDEN) == 6 and expected.sum() > 10_000  # the fixture is whole
    assert (found == expected).all()


def test_creff_on_paper_one_class_is_cut_in_equal_chunks_whatever_the_shares() -> None:
    clients = creff([list(range(45))], 4, 0.5, 3)
    assert [len(held) for held in clients] == [12, 11, 11, 11]


def kept_of(sizes: list[int]) -> list[list[int]]:
    """Consecutive indices, class by class."""
    edges = np.cumsum([0, *sizes]).tolist()
    return [list(range(a, b)) for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    how=st.sampled_from(["creff", "dirichlet", "iid"]),
    clients=st.integers(1, 25),
    alpha=st.sampled_from([0.1, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
    empty=st.booleans(),
)
def test_every_partition_is_disjoint_complete_deterministic_and_leaves_nobody_empty(
    sizes: list[int], how: Partition, clients: int, alpha: float, seed: int, empty: bool
) -> None:
    kept = kept_of(sizes)

    def draw() -> list[list[int]]:
        return partition(kept, how=how, clients=clients, alpha=alpha, seed=seed, min_size=0 if empty else 1)

    try:
        found = draw()
    except UserError:  # too few images for so many clients: said, never looped for ever
        assume(False)
    assert len(found) == clients
    assert sorted(i for held in found for i in held) == list(range(sum(sizes)))
    assert draw() == found
    assert empty or min(map(len, found)) >= 1


@pytest.mark.parametrize("how", ["creff", "iid"])
def test_equal_partitions_differ_by_one_image_at_most(how: Partition) -> None:
    for clients in (1, 7, 10, 13, 20, 30):
        sizes = [
            len(h) for h in partition(kept_of([300, 90, 33]), how=how, clients=clients, alpha=0.5, seed=1, min_size=1)
        ]
        assert max(sizes) - min(sizes) <= 1


def test_seeds_matter_and_small_alpha_skews() -> None:
    kept = kept_of([200] * 5)
    splits: list[Callable[[int], list[list[int]]]] = [
        lambda seed: creff(kept, 10, 0.5, seed),
        lambda seed: dirichlet(kept, 10, 0.5, seed, 1),
        lambda seed: iid(kept, 10, seed),
    ]
    assert all(split(1) != split(2) for split in splits)

    def classes_held(alpha: float) -> float:
        found = dirichlet(kept, 10, alpha, 7, 0)
        return float(np.mean([len({i // 200 for i in held}) for held in found]))

    assert classes_held(0.05) < 3 < classes_held(100.0) == 5


def test_min_size_is_kept_by_plain_dirichlet() -> None:
    assert min(map(len, dirichlet(kept_of([300] * 4), 8, 0.5, 7, 40))) >= 40


def test_hopeless_splits_stop_and_say_what_to_change() -> None:
    with pytest.raises(UserError, match=r"data\.min_size: .* 8 clients 149 images .* lower data.min_size to \d+"):
        dirichlet(kept_of([300] * 4), 8, 0.1, 7, 149, tries=20)
    with pytest.raises(UserError, match=r"raise data\.alpha"):
        creff(kept_of([5000]), 20, 0.001, 7, tries=20)


def test_shares_that_underflow_leave_the_class_to_the_last_worker_as_the_reference_does() -> None:
    nothing = np.random.RandomState(0).dirichlet([1e-300] * 3)  # every gamma draw underflows
    assert np.isnan(nothing).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said by us, not left to what NaN becomes as an integer
        for shares in (nothing, np.zeros(3)):
            assert _cut([4, 5, 6], shares) == [[], [], [4, 5, 6]]


def test_a_group_is_redrawn_until_its_smallest_worker_holds_half_of_an_equal_share() -> None:
    pairs = [(i, i % 4) for i in range(200)]
    for seed in range(20):
        held = _group(np.random.RandomState(seed), pairs, 4, 10, 0.3, 10_000)
        assert min(map(len, held)) >= 10  # half of 200 / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "data.clients"),
        ({"alpha": 0.0}, "data.alpha"),
        ({"alpha": float("nan")}, "data.alpha"),
        ({"min_size": -1}, "data.min_size"),
        ({"clients": 61}, "use fewer clients"),
        ({"how": "stars"}, "unknown partition"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"how": "iid", "clients": 2, "alpha": 0.5, "seed": 7, "min_size": 1, **change}
    with pytest.raises(UserError, match=message):
        partition(kept_of([30, 30]), **arguments)  # type: ignore[arg-type]


def test_more_clients_than_images_only_when_asked_for() -> None:
    found = partition(kept_of([3]), how="iid", clients=5, alpha=0.5, seed=7, min_size=0)
    assert sorted(map(len, found)) == [0, 0, 1, 1, 1]
