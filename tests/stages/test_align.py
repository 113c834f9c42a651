"""Alignment: eq. 5 moves what it should, eq. 6 uses q, and a teacher that knows nothing is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests import toy

from mllm_fl.algorithms.base import Broadcast, FedAvg, Server, Shard, Task
from mllm_fl.data.check import leaks, pixel_hashes
from mllm_fl.data.longtail import groups
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
from mllm_fl.runs import RunFolder, read_rows
from mllm_fl.seeds import stream
from mllm_fl.stages.align import AlignConfig, balanced, leftovers, make_aligner
from mllm_fl.stages.federate import FederateConfig, federate, outcome
from mllm_fl.trees import Tree, digest, weighted_mean

CONFIG = AlignConfig(per_class=4, steps=5, batch_size=6, lr=0.05, augment="none")


def knowing(labels: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return 5.0 * F.one_hot(labels, classes).float()


def test_one_step_by_hand() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    images = balanced(fed.train, 4, stream(0, "x"))
    y = torch.from_numpy(images.labels)
    q = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) + knowing(y)
    config = dataclasses.replace(CONFIG, steps=1, batch_size=12, beta=0.7)
    aligned, loss = make_aligner(config, images, lambda x: q)(task, w, 1)
    leaves = {k: v.clone().requires_grad_(k in task.trainable) for k, v in w.items()}
    logits = task.forward(leaves, images.normalised(range(12)), train=False)[1]
    p, t = logits.log_softmax(1), q.log_softmax(1)
    by_hand = F.nll_loss(p, y) + 0.7 * (t.exp() * (t - p)).sum(1).mean()  # eq. (6)
    assert loss == pytest.approx(by_hand.item(), abs=1e-6)
    grads = torch.autograd.grad(by_hand, [leaves[k] for k in task.trainable])
    for k, g in zip(task.trainable, grads, strict=True):
        assert torch.allclose(aligned[k], w[k] - 0.05 * g, atol=1e-6), k  # eq. (5)


def test_batch_norm_statistics_stay_unless_told() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    images = balanced(fed.train, 4, stream(0, "x"))
    for freeze in (True, False):
        aligned, _ = make_aligner(dataclasses.replace(CONFIG, freeze_batch_norm=freeze), images, None)(task, w, 1)
        assert torch.equal(aligned["backbone.bn.running_mean"], w["backbone.bn.running_mean"]) == freeze


def test_head_only_moves_the_head_only() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    aligned, _ = make_aligner(
        dataclasses.replace(CONFIG, parameters="head"), balanced(fed.train, 4, stream(0, "x")), None
    )(task, w, 1)
    moved = {k for k in w if not torch.equal(aligned[k], w[k])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_the_given_weights_are_not_changed_and_the_draws_are_named() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    before = digest(w)
    aligner = make_aligner(dataclasses.replace(CONFIG, augment="crop"), balanced(fed.train, 4, stream(0, "x")), None)
    assert digest(aligner(task, w, 1)[0]) == digest(aligner(task, w, 1)[0]) != digest(aligner(task, w, 2)[0])
    assert digest(w) == before


def test_beta_zero_does_not_ask_the_teacher() -> None:
    fed = toy.federation()
    images = balanced(fed.train, 4, stream(0, "x"))

    def teacher(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked")

    make_aligner(dataclasses.replace(CONFIG, beta=0.0), images, teacher)


def test_a_teacher_below_twice_chance_is_refused() -> None:
    images = balanced(toy.federation().train, 4, stream(0, "x"))
    with pytest.raises(UserError, match=r"zero-shot accuracy on the alignment images is 0.0%, below 2 x chance"):
        make_aligner(CONFIG, images, lambda x: knowing((torch.from_numpy(images.labels) + 1) % 3))


def test_balanced_draws_per_class_or_names_the_class_that_lacks_images() -> None:
    train = toy.federation().train
    assert balanced(train, 7, stream(0, "x")).class_counts() == [7, 7, 7]
    with pytest.raises(UserError, match="class 'class 0' has 20 images in toy/train, 21 asked for"):
        balanced(train, 21, stream(0, "x"))


def test_leftovers_are_balanced_and_say_what_clients_hold_too() -> None:
    fed = toy.federation(imbalance=4, clients=2)  # of 20 a class are kept 20, 10, 5: nothing is left of class 0
    images = leftovers(fed, 8, stream(0, "x"))
    assert images.class_counts() == [8, 8, 8]
    assert images.name == "toy/train leftover (8 of them also at clients), 8 a class"
    held = set(pixel_hashes(fed.subset))
    assert [sum(h in held for h in pixel_hashes(images)[c * 8 : c * 8 + 8]) for c in range(3)] == [8, 0, 0]
    assert leaks(images, fed.test) == 0


def test_the_aligned_model_is_what_the_next_round_broadcasts(tmp_path: Path) -> None:
    """Two rounds by hand: local training from the aligned weights, mean, alignment; equal to the round loop bit for bit."""
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    local = LocalConfig(epochs=1, augment="none")
    aligner = make_aligner(CONFIG, balanced(fed.train, 4, stream(0, "x")), None)
    with RunFolder(tmp_path / "r", {}) as run:
        state = federate(FederateConfig(rounds=2, clients_per_round=2, local=local), task, fed, w, run, aligner=aligner)
        last = read_rows(run.path / "rounds.jsonl")[-1]["accuracy"]
    for t in (1, 2):
        msg = Broadcast(w, {})
        sent = [train_client(task, FedAvg(), msg, {}, Shard(k, t, fed.client(k), 0), local)[0] for k in (0, 1)]
        w = aligner(task, weighted_mean((u.weight, u.w) for u in sent), t)[0]
    assert digest(state.w) == digest(w)
    assert last == evaluate(task, w, fed.test).scores(None)["accuracy"]


def test_after_every_aggregation_or_once_at_the_end(tmp_path: Path) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    config = FederateConfig(rounds=3, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    images = balanced(fed.train, 4, stream(0, "x"))
    for when, expected in (("every-round", [True, True, True]), ("end", [False, False, True])):
        aligner = make_aligner(dataclasses.replace(CONFIG, when=when), images, None)  # type: ignore[arg-type]
        with RunFolder(tmp_path / when, {}) as run:
            federate(config, task, fed, w, run, aligner=aligner)
            rows = read_rows(run.path / "rounds.jsonl")
        assert [r["align_loss"] is not None for r in rows] == expected
        assert rows[-1]["accuracy_before_align"] is not None


def test_aligned_once_the_curve_stays_unaligned_and_the_last_number_stands_apart(tmp_path: Path) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    config = FederateConfig(rounds=3, clients_per_round=2, report_last=2, local=LocalConfig(epochs=1, augment="none"))
    once = dataclasses.replace(CONFIG, when="end", lr=0.3, steps=30)
    aligner = make_aligner(once, balanced(fed.train, 4, stream(0, "x")), None)
    with RunFolder(tmp_path / "plain", {}) as run:
        federate(config, task, fed, w, run)
        plain = read_rows(run.path / "rounds.jsonl")
    with RunFolder(tmp_path / "once", {}) as run:
        state = federate(config, task, fed, w, run, aligner=aligner)
        rows = read_rows(run.path / "rounds.jsonl")
        final = outcome(config, task, state, fed.test, groups(fed.class_counts), run, aligner)
    keys = ("accuracy", "class_weighted", "per_class", "many", "medium", "few")
    assert [[r[k] for k in keys] for r in rows] == [[r[k] for k in keys] for r in plain]
    assert final["curve"] == "unaligned"
    assert final["last"]["accuracy"] == evaluate(task, state.w, fed.test).scores(None)["accuracy"]
    assert final["accuracy_before_align"] == rows[-1]["accuracy"] != final["last"]["accuracy"]
    assert final["mean_last"]["mean"] == (plain[-1]["accuracy"] + plain[-2]["accuracy"]) / 2
    assert (final["mean_last"]["rounds"], final["mean_last"]["n"]) == (2, 2)


@dataclasses.dataclass(frozen=True)
class OwnHead(FedAvg):
    """Like CReFF, it ships a head that it keeps beside the global weights."""

    def init(self, task: Task, w: Tree) -> Server:
        return Server(w, {k: torch.full_like(w[k], 0.25) for k in task.head})

    def deploy(self, task: Task, s: Server) -> Tree:
        return s.w | s.extra


def test_what_is_aligned_is_w_and_what_is_shipped_otherwise_is_named(tmp_path: Path) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    config = FederateConfig(rounds=1, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    aligner = make_aligner(CONFIG, balanced(fed.train, 4, stream(0, "x")), None)
    for method, otherwise in ((FedAvg(), []), (OwnHead(), list(task.head))):
        with RunFolder(tmp_path / type(method).__name__, {}) as run:
            state = federate(dataclasses.replace(config, method=method), task, fed, w, run, aligner=aligner)
            final = outcome(
                dataclasses.replace(config, method=method), task, state, fed.test, groups([20] * 3), run, aligner
            )
        assert final["deployed_otherwise"] == otherwise
        assert final["curve"] == "aligned"
        assert all(not torch.equal(state.w[k], w[k]) for k in task.head)  # w is aligned, head included
        shipped = method.deploy(task, state)
        assert final["weights_sha256"] == digest(shipped)
        assert all(bool((shipped[k] == 0.25).all()) == bool(otherwise) for k in task.head)


@pytest.mark.parametrize(
    ("field", "value"), [("beta", -1.0), ("temperature", 0.0), ("lr", 0.0), ("steps", 0), ("per_class", 0)]
)
def test_out_of_range_values_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^align.{field}: "):
        AlignConfig(**{field: value})  # type: ignore[arg-type]
