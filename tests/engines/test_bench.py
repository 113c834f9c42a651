"""The benchmark at the size of a toy: it checks that both sides did the same work, and says all that its table needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_fl import cli
from mllm_fl.engines import bench
from mllm_fl.engines.bench import Load
from mllm_fl.engines.profile import profile
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree

TINY = Load(clients=2, images=10, width=2, batch=4, repeats=1, tiny=3)


def test_all_numbers_of_a_line_and_equal_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.jsonl"
    words = [
        "bench",
        "--clients",
        "2",
        "--images",
        "10",
        "--width",
        "2",
        "--repeats",
        "1",
        "--tiny",
        "3",
        "--json",
        "--out",
    ]
    assert cli.main([*words, str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(out.read_text())
    names = ["bare", "serial fp32", "parallel fp32", "parallel fp32 nchw"]  # the tests' probe is off
    assert list(said["seconds"]) == list(said["core_seconds"]) == list(said["over_bare_shared"]) == names
    assert said["over_bare_shared"]["bare"] == 1 and said["wall_over_bare_shared"]["bare"] == said["cores"]
    assert said["largest_difference_of_weights"] < 1e-5
    assert said["overhead"]["clients"] == 2 and said["overhead_tiny"]["clients"] == 3
    assert set(said["limit_seconds"]) == {"fp32", "bf16"}
    assert list(said["pss_parts"]) == names[2:]
    if sys.platform == "linux":
        room = said["pss_parts"][names[3]]
        assert room["together"] == said["pss_bytes"] == room["parent"] + sum(room["workers"]) > 100e6
        assert len(room["workers"]) == said["cores"]
    assert {"commit", "torch", "processor", "load", "cores"} <= set(said)


def test_other_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.bare

    def another(*args: Any) -> list[Tree]:
        return [{k: v + 1 for k, v in w.items()} for w in real(*args)]

    monkeypatch.setattr(bench, "bare", another)
    with pytest.raises(UserError, match="the loops disagree by 1"):
        bench.measure(TINY)


def test_the_profile_names_every_part() -> None:
    for parts in profile(TINY).values():
        assert list(parts) == [
            "data", "forward", "backward", "optimiser", "rest", "aggregation of two", "evaluation of 1,000 images",
        ]  # fmt: skip
        assert all(s >= -1e-3 for s in parts.values())


def test_multiply_adds_of_the_papers_network() -> None:
    """194.71 M with width 64 (models/resnet8.py counts them by hand)."""
    from mllm_fl.models.network import ModelConfig, build_network

    assert round(bench._multiply_adds(build_network(ModelConfig(), 10, 0)) / 1e6, 2) == 194.71


def test_shards_are_a_function_of_their_number() -> None:
    one, other = TINY.shards(2, 5), TINY.shards(3, 5)
    assert torch.equal(one[1].x(range(5)), other[1].x(range(5)))
    assert not torch.equal(one[0].x(range(5)), one[1].x(range(5)))


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--repeats", "0"]) == 2
    assert capsys.readouterr().err == "mllm-fl: --repeats: 0 is below 1\n"
