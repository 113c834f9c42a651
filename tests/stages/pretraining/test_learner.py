"""A step is the same step however it is cut: into parts, with layers computed twice, in bf16 nearly; and what drives it is an option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_llava

from mllm_fl.errors import UserError
from mllm_fl.events import silent
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.models.teacher.llava import LlavaTeacher, load_llava
from mllm_fl.runs import read_json
from mllm_fl.stages import pretrain as stage
from mllm_fl.stages.pretraining import run as run_of
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.parallel import World
from mllm_fl.trees import Tree, clone

CONFIG = PretrainConfig(steps=4, batch_size=8, alpha="constant", alpha_value=0.5, image_size=16, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.save_tiny(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def taken(config: PretrainConfig, folder: Path, corpus: Path, where: Path, **model: Any) -> tuple[dict[str, Any], Tree]:
    """The first step's row and the gradients that it took."""
    where.mkdir()
    net = build_network(ModelConfig(width=4, adapter_dim=tiny_llava.WIDTH, **{"adapter": "linear", **model}), 10, 0)
    half = torch.bfloat16 if config.precision == "bf16" else torch.float32
    teacher: LlavaTeacher = load_llava(str(folder), dtype=half)
    run = run_of.Run(config, net, corpus, teacher, where, 0, {}, World(), silent)
    run.prepare(teacher, "cpu", (0.5,) * 3, (0.5,) * 3)
    row = run.step(0)
    run.close()
    return row, {k: p.grad.clone() for k, p in run.learner.trainable.items() if p.grad is not None}


@pytest.mark.parametrize("change", [{"micro_batch": 3}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("more", [{}, {"feature_mse": 2.0, "lm_samples": 5}])
def test_parts_and_layers_computed_twice_are_the_same_step(
    folder: Path, corpus: Path, tmp_path: Path, change: dict[str, Any], more: dict[str, Any]
) -> None:
    whole, a = taken(replace(CONFIG, **more), folder, corpus, tmp_path / "a")
    parts, b = taken(replace(CONFIG, **more, **change), folder, corpus, tmp_path / "b")
    assert parts == pytest.approx(whole, rel=1e-5)
    for k, grad in a.items():  # the same numbers, added up in another order
        torch.testing.assert_close(b[k], grad, rtol=1e-3, atol=1e-6)


def test_layers_computed_twice_keep_less(folder: Path, corpus: Path, tmp_path: Path) -> None:
    def kept(**change: Any) -> int:
        seen: list[int] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            seen.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            taken(replace(CONFIG, **change), folder, corpus, tmp_path / str(change))
        return sum(seen)

    assert kept(gradient_checkpointing=True, alpha="one") < 0.9 * kept(alpha="one")


def test_in_bf16_the_frozen_weights_are_bf16_and_the_compact_ones_are_not(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    full, a = taken(CONFIG, folder, corpus, tmp_path / "a")
    half, b = taken(replace(CONFIG, precision="bf16"), folder, corpus, tmp_path / "b")
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and half["loss"] != full["loss"]
    assert {g.dtype for g in b.values()} == {torch.float32}
    one, other = (torch.cat([g[k].flatten() for k in a]) for g in (a, b))
    assert float(torch.cosine_similarity(one, other, 0)) > 0.98


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_both_adapters_learn(folder: Path, corpus: Path, tmp_path: Path, adapter: str) -> None:
    _, grads = taken(CONFIG, folder, corpus, tmp_path / "a", adapter=adapter)
    assert {k for k in grads if k.startswith("adapter.")} and all(bool(g.any()) for g in grads.values())


def moved(config: PretrainConfig, folder: Path, corpus: Path, where: Path) -> float:
    """The largest change of a weight in the first step."""
    where.mkdir()
    net = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=tiny_llava.WIDTH), 10, 0)
    before = clone(net.state_dict())
    teacher = load_llava(str(folder))
    run = run_of.Run(config, net, corpus, teacher, where, 0, {}, World(), silent)
    run.prepare(teacher, "cpu", (0.5,) * 3, (0.5,) * 3)
    run.step(0)
    run.close()
    return float(max((p.detach() - before[k]).abs().max() for k, p in run.learner.trainable.items()))


def test_what_drives_a_step_while_alpha_is_small(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """At alpha 1e-3 the gradient is small: Adam takes a full step of lr, the other drives and a large epsilon do not."""
    small = replace(CONFIG, alpha_value=1e-3, warmup=0.0, schedule="constant", lr=1e-2)
    steps = {
        name: moved(replace(small, **change), folder, corpus, tmp_path / name)  # type: ignore[arg-type]
        for name, change in {"adam": {}, "alpha": {"drive": "alpha"}, "sgd": {"drive": "sgd"}, "eps": {"eps": 0.1}}.items()
    }  # fmt: skip
    assert steps["adam"] == pytest.approx(1e-2, rel=0.05)
    assert steps["alpha"] == pytest.approx(1e-5, rel=0.05)
    assert 0 < steps["sgd"] < 1e-4 and 0 < steps["eps"] < 1e-3


def test_a_batch_is_overfitted_on_request_with_a_copy_of_the_network(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    net = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=tiny_llava.WIDTH), 10, 0)
    config = replace(CONFIG, steps=2, lr=1e-2)
    teacher = load_llava(str(folder))
    plain = stage.pretrain(config, net, corpus, tmp_path / "a", teacher=teacher)
    asked = stage.pretrain(replace(config, overfit=15), net, corpus, tmp_path / "b", teacher=teacher)
    assert all(torch.equal(plain[k], asked[k]) for k in plain)  # it leaves no trace in the weights
    told = read_json(tmp_path / "b" / "preflight.json")["overfit"]
    assert told["steps"] == 15 and told["last"] < told["first"]
    with pytest.raises(UserError, match=r"pretrain\.overfit: the loss on one batch went from"):
        stage.pretrain(replace(config, overfit=3, lr=0.0), net, corpus, tmp_path / "c", teacher=teacher)
