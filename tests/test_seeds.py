"""Streams: the same name gives the same draws, another name others, and nothing global moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mllm_fl.seeds import numpy_stream, seed_of, stream


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


def test_global_generators_stay_where_they_are() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    stream(5, "z")
    numpy_stream(5, "z").random()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
