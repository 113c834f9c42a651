"""Streams: the same name gives the same draws, another name others, and nothing global moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mllm_fl.algorithms.base import Shard
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream, seed_of, stream
from tests import toy


def test_same_name_same_draws_other_name_other_draws() -> None:
    names: list[tuple[Any, ...]] = [
        (0, "a", 1, 2),
        (1, "a", 1, 2),
        (0, "b", 1, 2),
        (0, "a", 2, 1),
        (0, "a", 12),
        (0, "a", "1", 2, 0),
    ]
    assert len({seed_of(*n) for n in names}) == len(names)
    assert torch.equal(torch.rand(5, generator=stream(0, "a", 1)), torch.rand(5, generator=stream(0, "a", 1)))
    assert (numpy_stream(3, "x").random(4) == numpy_stream(3, "x").random(4)).all()
    assert all(0 <= seed_of(*n) < 2**63 for n in names)


def test_torch_takes_32_bits_of_the_seed_and_numpy_all_of_them() -> None:
    """What the module says about collisions; the day torch takes more, the sentence goes."""
    torch_draws = [torch.rand(3, generator=torch.Generator().manual_seed(5 + k * 2**32)) for k in (0, 1)]
    assert torch.equal(*torch_draws)
    numpy_draws = [np.random.default_rng(5 + k * 2**32).random() for k in (0, 1)]
    assert numpy_draws[0] != numpy_draws[1]


def test_a_method_gets_its_own_streams_and_none_of_the_engines() -> None:
    fed = toy.federation()
    task, shard = toy.task(fed)[0], Shard(1, 2, fed.client(1), 0)
    assert torch.equal(
        torch.rand(4, generator=shard.stream("mixup")), torch.rand(4, generator=stream(0, "mixup", 2, 1))
    )
    assert torch.equal(
        torch.rand(4, generator=task.stream("distil", 3)), torch.rand(4, generator=stream(0, "distil", 3))
    )
    for purpose in ("shuffle", "augment", "align", "sampling", "init"):
        for ask in (shard.stream, task.stream):
            with pytest.raises(UserError, match=rf"stream '{purpose}': is drawn from by the engine itself"):
                ask(purpose)


def test_global_generators_stay_where_they_are() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    stream(5, "z")
    numpy_stream(5, "z").random()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
