"""Alpha and the learning rate, step by step, by hand; neither moves the other unless it is asked to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mllm_fl.errors import UserError
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.schedules import alpha_at, lr_at

CONFIG = PretrainConfig(lr=1.0, warmup=0.1)


@pytest.mark.parametrize(
    ("change", "want"),  # at steps 0, 25, 30, 50, 99, 100, 199 of 200: half of them are 100
    [
        ({"alpha": "linear"}, [0, 0.25, 0.3, 0.5, 0.99, 1, 1]),
        ({"alpha": "stepwise"}, [0, 0.25, 0.25, 0.5, 0.75, 1, 1]),
        ({"alpha": "stepwise", "alpha_levels": 2}, [0, 0, 0, 0.5, 0.5, 1, 1]),
        ({"alpha": "constant", "alpha_value": 0.3}, [0.3] * 7),
        ({"alpha": "none"}, [1] * 7),
        ({"alpha": "zero"}, [0] * 7),
        ({"alpha": "linear", "alpha_until": 1.0}, [0, 0.125, 0.15, 0.25, 0.495, 0.5, 0.995]),
    ],
)
def test_alpha(change: dict[str, Any], want: list[float]) -> None:
    config = replace(CONFIG, **change)
    assert [alpha_at(config, s, 200) for s in (0, 25, 30, 50, 99, 100, 199)] == pytest.approx(want)


@pytest.mark.parametrize(
    ("schedule", "want"),  # 20 steps, 2 of them warm-up: 9 of 18 are half of the fall
    [("cosine", [0.5, 1, 1, 0.5]), ("linear", [0.5, 1, 1, 0.5]), ("constant", [0.5, 1, 1, 1])],
)
def test_rate(schedule: Any, want: list[float]) -> None:
    config = replace(CONFIG, schedule=schedule)
    assert [lr_at(config, s, 20) for s in (0, 1, 2, 11)] == pytest.approx(want)
    assert lr_at(replace(config, alpha="zero"), 11, 20) == pytest.approx(want[-1])  # alpha has no say
    quarter = {"cosine": 0.85355, "linear": 0.75, "constant": 1.0}[schedule]
    assert lr_at(replace(config, warmup=0.0), 5, 20) == pytest.approx(quarter, abs=1e-4)


def test_rate_times_alpha_on_request() -> None:
    config = replace(CONFIG, drive="alpha", alpha="constant", alpha_value=0.25)
    assert lr_at(config, 11, 20) == pytest.approx(0.125)
    assert lr_at(replace(config, alpha="paper"), 0, 20) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha_value": 1.5}, r"pretrain\.alpha_value: 1\.5 is outside 0 \.\. 1"),
        ({"alpha_levels": 0}, r"pretrain\.alpha_levels: 0 is below 1"),
        ({"micro_batch": 0}, r"pretrain\.micro_batch: 0 is below 1"),
        ({"overfit": 0}, r"pretrain\.overfit"),
        ({"eps": -1.0}, r"pretrain\.eps"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)


def test_which_settings_need_clip() -> None:
    ask = [{"alpha": "one"}, {"alpha": "none"}, {"alpha": "paper"}, {"alpha": "one", "feature_mse": 1.0}, {"alpha": "one", "objective": "features"}]  # fmt: skip
    assert [replace(CONFIG, **a).needs_clip for a in ask] == [False, False, True, True, True]  # type: ignore[arg-type]
