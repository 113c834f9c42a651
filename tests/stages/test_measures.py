"""What a run cost and what each client has of it, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import toy

from mllm_fl.algorithms.base import Server
from mllm_fl.engines.flops import of_image
from mllm_fl.engines.local import LocalConfig
from mllm_fl.stages.align import AlignConfig, Aligner
from mllm_fl.stages.measures import bill, overhead, standing
from mllm_fl.stages.schedule import FederateConfig

LOCAL = LocalConfig(epochs=2, batch_size=8, augment="none")
ROWS: dict[str, list[dict[str, Any]]] = {
    "rounds": [{"evaluated": False, "clients": [0, 1]}, {"evaluated": True, "clients": [0, 1], "per_class": [1, 1, 0]}],
    "clients": [{"samples": 10, "bytes_up": 100, "bytes_down": 60}, {"samples": 20, "bytes_up": 300, "bytes_down": 60}],
    "timings": [
        {"client_seconds": 3.0, "cpu_joules": 5.0, "gpu_joules": None, "peak_bytes": 70},
        {"client_seconds": 1.0, "cpu_joules": 6.0, "gpu_joules": None, "peak_bytes": 90},
    ],
}


def test_each_client_is_judged_by_its_own_images() -> None:
    fed = toy.federation(clients=2)
    found = standing({"per_class": [1.0, 0.5, 0.0]}, [*ROWS["rounds"], {"per_class": [0, 1, 1]}], fed)
    held = [fed.client(k).class_counts() for k in range(2)]
    assert found["per_client"]["each"] == [pytest.approx((a + b / 2) / (a + b + c)) for a, b, c in held]
    assert found["forgetting"]["per_class"] == [1, 0, 0]
    rows: list[dict[str, Any]] = [
        {"round": 2, "accuracy": 0.5},
        {"round": 3, "accuracy": None},
        {"round": 4, "accuracy": 0.25},
    ]
    assert standing({"per_class": [1, 1, 1]}, rows, fed)["history"] == {"round": [2, 4], "accuracy": [0.5, 0.25]}


def test_costs_are_one_step_multiplied() -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    config = FederateConfig(rounds=2, clients_per_round=2, local=LOCAL)
    found = overhead(config, task, fed, Server(w, round=2), ROWS)
    forward = of_image(task, w, fed.test)
    flop = found["flop"]
    assert flop["evaluate"] == round(forward * 15 * 2)  # one evaluated round and the last look
    assert (flop["server"], flop["align"]) == (0, 0)
    step = flop["clients"] / (30 * 2)  # 30 images were visited, two epochs each
    assert 2 * forward < step <= 3 * forward
    assert found["per_visit"] == {
        "visits": 2,
        "seconds": 2.0,
        "flop": flop["clients"] / 2,
        "bytes_up": 200,
        "bytes_down": 60,
    }
    assert found["joules"] == {"cpu": 11.0, "gpu": None}
    assert found["peak_bytes"] == {"process": 90, "workers": None, "gpu": None}
    twice = overhead(replace(config, local=replace(LOCAL, epochs=4)), task, fed, Server(w, round=2), ROWS)
    assert twice["flop"]["clients"] == 2 * flop["clients"]


def test_alignment_counts_its_steps_in_every_round_or_once() -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    x, y = fed.test.normalised(range(6)), torch.from_numpy(fed.test.labels[:6])
    aligner = Aligner(AlignConfig(steps=5, batch_size=6, augment="none"), x, y, torch.zeros(6, 3))
    config = FederateConfig(rounds=2, clients_per_round=2, local=LOCAL)
    every, once = (
        overhead(
            config, task, fed, Server(w), ROWS, aligner=replace(aligner, config=replace(aligner.config, when=when))
        )
        for when in ("every-round", "end")
    )
    assert every["flop"]["align"] == 2 * once["flop"]["align"] > 0
    assert once["flop"]["align"] % 5 == 0


def test_a_count_that_fails_does_not_lose_the_run() -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    found = overhead(
        FederateConfig(local=LOCAL), task, fed, Server({k: v for k, v in w.items() if "conv" not in k}), ROWS
    )
    assert set(found["flop"].values()) == {None} and found["flop_rule"].startswith("not measured: ")
    assert found["joules"]["cpu"] == 11.0


def test_the_annotation_bill_is_the_sum_over_kinds(tmp_path: Path) -> None:
    kind = {"ok": 3, "failed": 1, "attempts": 5, "prompt_tokens": 10.0, "completion_tokens": 2.0, "seconds": 1.5}
    assert bill({"model": "m", "kinds": {"caption": kind, "detail": kind | {"seconds": None}}}) == {
        "model": "m", "questions": 10, "answers": 6, "failed": 2, "prompt_tokens": 20.0, "completion_tokens": 4.0, "seconds": 1.5,
    }  # fmt: skip
