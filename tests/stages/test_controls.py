"""Stage 3's identities (PROTOCOL §4.1) and its controls: what each of them leaves of the alignment, and that a wrong q hurts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from tests import toy
from tests.stages.test_align import CONFIG, knowing

from mllm_fl.algorithms.base import FedAvg
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.losses import alignment, cross_entropy
from mllm_fl.runs import RunFolder, read_rows
from mllm_fl.seeds import stream
from mllm_fl.stages import chain
from mllm_fl.stages.align import AlignConfig, Aligner, make_aligner
from mllm_fl.stages.alignment_images import balanced
from mllm_fl.stages.federate import federate
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import digest


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y = torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_the_gradient_is_p_minus_y_plus_beta_p_minus_q(beta: float) -> None:
    z, q = logits(0).requires_grad_(), logits(1).softmax(1)
    (grad,) = torch.autograd.grad(alignment(z, Y, logits(1), beta), z)
    p, y = z.detach().softmax(1), F.one_hot(Y, 4)
    assert torch.allclose(grad, ((p - y) + beta * (p - q)) / 5, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_it_is_cross_entropy_with_clip_smoothed_labels_up_to_the_entropy_of_q(beta: float) -> None:
    """L_align = (1 + beta) CE(p, (y + beta q) / (1 + beta)) - beta H(q)."""
    z, q = logits(2), logits(3).softmax(1)
    smoothed = (F.one_hot(Y, 4) + beta * q) / (1 + beta)
    ce = -(smoothed * z.log_softmax(1)).sum(1).mean()
    entropy = -(q * q.log()).sum(1).mean()
    assert float(alignment(z, Y, logits(3), beta)) == pytest.approx(float((1 + beta) * ce - beta * entropy), abs=1e-12)


def test_beta_zero_is_cross_entropy_bit_for_bit() -> None:
    assert torch.equal(alignment(logits(0), Y, logits(1), 0.0), cross_entropy(logits(0), Y))


def aligner(beta: float = 1.0, wrong_teacher: bool = False, **changes: Any) -> tuple[Aligner, Any, Any]:
    fed = toy.federation()
    images = balanced(fed.train, 4, stream(0, "x"))
    config = dataclasses.replace(CONFIG, beta=beta, **changes)
    y = torch.from_numpy(images.labels)
    return make_aligner(config, images, lambda _: knowing((y + wrong_teacher) % 3)), fed, images


def weights(made: Aligner) -> str:
    task, w = toy.task(toy.federation())
    return digest(made(task, w, 1)[0])


def test_each_control_is_the_formula_that_it_names() -> None:
    """``ce`` is beta = 0; ``uniform`` is q = 1/C; ``kl`` leaves the labels out; ``wrong`` is a teacher whose classes are shifted by one."""
    plain = aligner()[0]
    assert weights(aligner(control="ce")[0]) == weights(aligner(beta=0.0)[0]) != weights(plain)
    z, rows = logits(4)[:, :3].float(), torch.arange(5)
    p, q = z.log_softmax(1), knowing(plain.y).log_softmax(1)[:5]

    def kl_of(log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - p)).sum(1).mean()

    ce = F.nll_loss(p, plain.y[:5])
    expected = {
        None: ce + kl_of(q), "ce": ce, "alone": ce, "kl": kl_of(q),
        "uniform": ce + kl_of(torch.full((5, 3), 1 / 3).log()), "wrong": ce + kl_of(q.roll(1, 1)),
    }  # fmt: skip
    for control, value in expected.items():
        assert float(aligner(control=control)[0].loss(z, rows)) == pytest.approx(float(value), abs=1e-5), control
    shifted = aligner(wrong_teacher=True, refuse_below=0.0)[0]
    assert weights(aligner(control="wrong")[0]) == weights(shifted) != weights(plain)
    half = aligner(temperature=3.0, scale_by_t2=True)[0]
    assert weights(half) == weights(aligner(beta=9.0, temperature=3.0)[0]) != weights(aligner(temperature=3.0)[0])


def test_a_wrong_q_hurts() -> None:
    """With beta = 4 the labels are outvoted: the model learns the shifted classes."""
    found = {}
    for control in (None, "ce", "wrong"):
        made, fed, _ = aligner(beta=4.0, control=control, steps=150, lr=0.05)
        task, w = toy.task(fed)
        found[control] = evaluate(task, made(task, w, 1)[0], fed.test).scores(None)["accuracy"]
    assert found[None] > 0.9 and found["ce"] > 0.9 and found["wrong"] < 0.4


def test_controls_that_ask_no_teacher_do_not_load_one_and_contradictions_are_refused() -> None:
    images = balanced(toy.federation().train, 4, stream(0, "x"))

    def asked(_: Any) -> torch.Tensor:
        raise AssertionError

    for control in ("ce", "uniform", "alone"):
        make_aligner(dataclasses.replace(CONFIG, control=control), images, asked)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        make_aligner(dataclasses.replace(CONFIG, control="kl"), images, asked)
    with pytest.raises(UserError, match=r"align.control: 'wrong' is about q, which beta = 0 leaves out"):
        AlignConfig(control="wrong", beta=0)
    with pytest.raises(UserError, match="align.control"):
        AlignConfig(control="alone", when="end")
    with pytest.raises(UserError, match="align.refuse_below"):
        AlignConfig(refuse_below=-1)


def test_a_teacher_below_the_threshold_is_taken_when_told() -> None:
    made, _, _ = aligner(wrong_teacher=True, refuse_below=0.0)
    assert made.zero_shot == 0.0
    with pytest.raises(UserError, match=r"is 0.0%, below 2 x chance \(66.7%\); .* align.refuse_below = 0 takes it"):
        aligner(wrong_teacher=True)


def test_alone_asks_no_client_and_learns_batch_norms_statistics(tmp_path: Path) -> None:
    made, fed, _ = aligner(control="alone")
    task, w = toy.task(fed)
    config = FederateConfig(rounds=2, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    with RunFolder(tmp_path, {}) as run:
        state = federate(config, task, fed, w, run, aligner=made)
        rows, clients, events = (read_rows(run.path / f"{n}.jsonl") for n in ("rounds", "clients", "events"))
    by_hand = made(task, made(task, w, 1)[0], 2)[0]
    assert digest(state.w) == digest(by_hand)
    assert [r["clients"] for r in rows] == [[], []] and not clients and not events
    assert sum(r["bytes_up"] + r["bytes_down"] for r in rows) == 0
    assert not torch.equal(state.w["backbone.bn.running_mean"], w["backbone.bn.running_mean"])


RAW: dict[str, Any] = {
    "data": {"source": "digits", "clients": 4, "imbalance_factor": 10, "image_size": 8}, "model": {"width": 2},
    "federate": {"rounds": 1, "clients_per_round": 2, "local": {"epochs": 1, "augment": "none"}},
    "align": {"source": "leftover", "per_class": 5, "steps": 2, "augment": "none", "beta": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("control", [None, "ce", "alone", "clients"])
def test_whole_runs_say_what_they_were_aligned_on(
    control: Literal["ce", "alone", "clients"] | None, tmp_path: Path
) -> None:
    from mllm_fl.config import from_dict

    c = from_dict(RAW | {"align": RAW["align"] | ({"control": control} if control else {})}, "here")
    final = chain.run(c, tmp_path)
    assert final["align"] == {
        "source": final["align"]["source"], "images": 50, "per_class": 5, "in_domain": True, "control": control,
        "zero_shot": None,
    }  # fmt: skip
    assert final["align"]["source"].startswith("digits leftover") and final["leaks"]["align/test"] == 0
    assert final["stages"]["align"] == (control != "clients")
    held = chain.federation_of(c).class_counts
    assert final["class_counts"] == [n + 5 * (control == "clients") for n in held]
    assert isinstance(c.federate.method, FedAvg)
    if control in ("alone", "clients"):
        with pytest.raises(UserError, match="changes the rounds themselves"):
            chain.align_finished(c, tmp_path)
