"""Trees: the mean that is exact for equal trees, and updates that must not enter it."""

from __future__ import annotations

import torch

from mllm_fl.trees import digest, nbytes, sq_dist, weighted_mean, why_invalid


def test_two_clients_by_hand() -> None:
    a = {"w": torch.tensor([1.0, 4.0]), "bn.num_batches_tracked": torch.tensor(10)}
    b = {"w": torch.tensor([5.0, 0.0]), "bn.num_batches_tracked": torch.tensor(13)}
    mean = weighted_mean([(3.0, a), (1.0, b)])
    assert mean["w"].tolist() == [2.0, 3.0]  # (3*1 + 1*5) / 4, (3*4 + 1*0) / 4
    assert mean["bn.num_batches_tracked"].dtype == torch.int64
    assert mean["bn.num_batches_tracked"].item() == 11  # 10.75 to the nearest whole batch


def test_equal_trees_average_to_themselves_bit_for_bit() -> None:
    a = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1)) / 3}
    mean = weighted_mean([(620.0, a), (621.0, a), (7.0, a)])
    assert torch.equal(mean["w"], a["w"])


def test_mean_lies_between_the_clients() -> None:
    g = torch.Generator().manual_seed(2)
    trees = [{"w": torch.randn(50, generator=g)} for _ in range(5)]
    mean = weighted_mean([(float(i + 1), t) for i, t in enumerate(trees)])["w"]
    stack = torch.stack([t["w"] for t in trees])
    assert bool(((mean >= stack.min(0).values) & (mean <= stack.max(0).values)).all())


def test_squared_distance_by_hand() -> None:
    assert (
        sq_dist(
            {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}, {"a": torch.tensor([0.0]), "b": torch.zeros(2)}
        ).item()
        == 25
    )


def test_what_is_wrong_with_an_update_is_said() -> None:
    like = {"w": torch.zeros(2), "n": torch.tensor(1)}
    good = {"w": torch.ones(2), "n": torch.tensor(2)}
    assert why_invalid(good, like) is None
    assert why_invalid(good | {"w": torch.ones(3)}, like) == "w: shape (3,) instead of (2,)"
    assert why_invalid(good | {"w": torch.tensor([1.0, float("nan")])}, like) == "w: NaN"
    assert why_invalid(good | {"w": torch.tensor([1.0, float("-inf")])}, like) == "w: Inf"
    assert why_invalid(good | {"w": torch.tensor([1.0, -2e6])}, like) == "w: magnitude 2e+06 > 1e+06"
    assert why_invalid({"w": torch.ones(2)}, like) == "names differ: ['n']"
    assert "dtype" in str(why_invalid(good | {"w": torch.ones(2, dtype=torch.float64)}, like))


def test_digest_tells_trees_apart_but_not_their_order() -> None:
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}
    assert digest(a) == digest({"y": torch.tensor([2.0]), "x": torch.tensor([1.0])})
    assert digest(a) != digest(a | {"x": torch.tensor([1.0000001])})
    assert digest(a) != digest(a | {"x": torch.tensor([1.0], dtype=torch.float64)})
    assert nbytes(a) == 8
