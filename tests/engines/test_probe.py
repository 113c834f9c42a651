"""The probe: what is decided from given seconds, what is kept, and that it measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.engines import probe
from mllm_fl.engines.config import EngineConfig
from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, build_network

SECONDS = {"fp32/nchw": 1.0, "fp32/channels_last": 0.9, "bf16/nchw": 0.5, "bf16/channels_last": 0.49}
NET = build_network(ModelConfig(width=2), 3, 0)


@pytest.mark.parametrize(
    ("seconds", "config", "expected"),
    [
        (SECONDS, EngineConfig(), ("bf16", "nchw")),  # 0.49 against 0.50 is not worth another layout
        (SECONDS | {"bf16/channels_last": 0.4}, EngineConfig(), ("bf16", "channels_last")),
        (SECONDS, EngineConfig(precision="fp32"), ("fp32", "channels_last")),
        (SECONDS, EngineConfig(layout="channels_last"), ("bf16", "channels_last")),
        ({"fp32/nchw": 1.0, "fp32/channels_last": 0.98}, EngineConfig(), ("fp32", "nchw")),
        (SECONDS, EngineConfig(precision="tf32"), ("fp32", "nchw")),  # of no effect on a CPU
        ({"fp32/nchw": 1.0}, EngineConfig(precision="bf16"), ("bf16", "nchw")),  # asked for, however slow it is
    ],
)
def test_the_quickest_of_what_is_left_open(
    seconds: dict[str, float], config: EngineConfig, expected: tuple[str, str]
) -> None:
    assert tuple(probe.fastest(seconds, config).values()) == expected


def test_a_run_goes_on_as_it_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probed", lambda *_: pytest.fail("nothing is left to measure"))
    begun = {"name": "auto", "precision": "bf16", "layout": "channels_last"}
    found = probe.chosen(EngineConfig(), NET, 8, 4, begun)
    assert (found.precision, found.layout) == ("bf16", "channels_last")
    found = probe.chosen(EngineConfig(precision="fp32", layout="nchw"), NET, 8, 4, {})
    assert (found.precision, found.layout) == ("fp32", "nchw")


def test_what_the_probe_said_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLLM_FL_PROBE", raising=False)
    monkeypatch.setattr(probe, "probed", lambda *_: SECONDS)
    assert probe.chosen(EngineConfig(), NET, 8, 4, {}).precision == "bf16"
    monkeypatch.setenv("MLLM_FL_PROBE", "off")
    assert probe.chosen(EngineConfig(), NET, 8, 4, {}).precision == "fp32"


def test_measured_once_and_kept_by_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measured(net: Any, side: int, batch: int) -> dict[str, float]:
        asked.append(side)
        return SECONDS

    monkeypatch.setattr(probe, "measured", measured)
    for side in (8, 8, 16):
        assert probe.probed(NET, side, 4, tmp_path) == SECONDS
    assert asked == [8, 16]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[0].write_text("{")  # a damaged file is measured again
    for side in (8, 16):
        assert probe.probed(NET, side, 4, tmp_path) == SECONDS
    assert len(asked) == 3
    assert json.loads(kept[0].read_text())["seconds"] == SECONDS


def test_it_measures_all_that_are_not_far_behind() -> None:
    seconds = probe.measured(NET, 8, 4, budget=0.05)
    assert seconds and set(seconds) <= {"/".join(c) for c in probe.CHOICES}
    assert all(s > 0 for s in seconds.values())


def test_workers_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"federate\.engine\.workers: 0 is below 1"):
        EngineConfig(workers=0)


def test_probing_leaves_the_network_as_it_was() -> None:
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    probe.measured(NET, 8, 4, budget=0.02)
    assert all((NET.state_dict()[k] == v).all() for k, v in before.items())
