"""Memory counted before a weight is there, by hand where that is possible; one batch overfitted."""

from __future__ import annotations

import pytest
import torch
from tests import tiny_llava
from tests.tiny_families import teacher_of
from torch import nn

from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.models.teacher.families import FAMILIES
from mllm_fl.models.teacher.llava import Blueprint, open_llava
from mllm_fl.stages.pretraining import preflight


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    """Of a folder whose weights are gone: nothing here may ask for them."""
    folder = tiny_llava.save_tiny(tmp_path_factory.mktemp("llava"))
    (folder / "model.safetensors").unlink()
    return open_llava(str(folder))


def estimate(plan: Blueprint, **change: object) -> dict[str, int]:
    asked = {"side": 16, "share": 8, "part": 8, "tokens": 40, "predicted": 20, "half": False, "checkpointing": False}
    network = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=8), 10, 0)
    return preflight.estimate(plan, network, **{**asked, **change})  # type: ignore[arg-type]


def test_what_a_pass_keeps_by_hand() -> None:
    """Two linear layers of 4 x 4 on 3 rows, ReLU between: kept are the input and the ReLU's output, 3 * 4 * 4 bytes each."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.ones(3, 4)
    assert preflight.kept_bytes(lambda: net(x), net) == 2 * 48
    net.requires_grad_(False)
    x = x.clone().requires_grad_()
    assert preflight.kept_bytes(lambda: net(x), net) == 48  # frozen layers need no input, ReLU its output


def test_parts_of_the_estimate(plan: Blueprint) -> None:
    whole = estimate(plan)
    weights = sum(p.numel() for p in tiny_llava.build().parameters())
    assert whole["frozen weights"] == 4 * weights
    assert whole["logits"] == 8 * 20 * plan.config.text_config.vocab_size * 16
    assert whole["total"] == sum(v for k, v in whole.items() if k != "total")
    assert estimate(plan, part=2)["language model"] * 4 == whole["language model"]
    assert estimate(plan, half=True)["frozen weights"] == 2 * weights
    assert estimate(plan, checkpointing=True)["language model"] < 0.7 * whole["language model"]
    assert estimate(plan, shard=True, processes=2)["frozen weights"] == 2 * weights
    assert set(estimate(plan, skip_lm=True)) == {"frozen weights", "compact model", "total"}
    grown = estimate(plan, share=16)["compact model"] - whole["compact model"]
    assert grown == pytest.approx(whole["compact model"] - estimate(plan, share=0)["compact model"])


def test_a_batch_that_cannot_be_overfitted_stops_the_run() -> None:
    assert preflight.overfitted([2.0, 1.0]) == {"steps": 2, "first": 2.0, "last": 1.0}
    with pytest.raises(
        UserError, match=r"pretrain\.overfit: the loss on one batch went from 1\.0000 to 1\.5000 in 3 steps"
    ):
        preflight.overfitted([1.0, 1.2, 1.5])


def test_the_peak_is_measured_from_where_it_began() -> None:
    device = torch.device("cpu")
    before = preflight.resident()
    preflight.forget_peak(device)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 32 << 20 < preflight.peak_bytes(device, before) < 1 << 30


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llava"])
def test_every_family_can_be_estimated(family: str) -> None:
    teacher = teacher_of(family)
    network = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=teacher.width), 10, 0)
    asked = {"side": 16, "share": 2, "part": 2, "tokens": 30, "predicted": 5, "half": False, "checkpointing": False}
    out = preflight.estimate(teacher, network, **asked)  # type: ignore[arg-type]
    assert out["frozen weights"] == 4 * sum(p.numel() for p in teacher.model.parameters())
    assert out["language model"] > 2 * 30 * 16 * 4  # more than its input
