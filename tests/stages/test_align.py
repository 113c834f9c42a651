"""Alignment: eq. 5 moves what it should, eq. 6 uses q, and a teacher that knows nothing is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from tests import toy
from tests.data.pictures import encoded, noise, write_folder
from tests.data.test_imagenet_lt import imagenet

from mllm_fl.algorithms.base import Broadcast, FedAvg, Server, Shard, Task
from mllm_fl.data.augment import augment
from mllm_fl.data.check import leaks, pixel_hashes, prints
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.glyphs import DIGITS, LETTERS, glyph_set, render_glyphs
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import groups
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
from mllm_fl.losses import kl
from mllm_fl.runs import RunFolder, read_rows
from mllm_fl.seeds import stream
from mllm_fl.stages.align import AlignConfig, delivered, make_aligner
from mllm_fl.stages.alignment_images import alignment_set, balanced, leftovers
from mllm_fl.stages.federate import federate
from mllm_fl.stages.outcome import outcome
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.stages.server import ServerConfig, unlabelled_images
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
    aligned, loss = make_aligner(config, images, lambda _: q)(task, w, 1)
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

    def teacher(images: ImageSet) -> torch.Tensor:
        raise AssertionError("asked")

    make_aligner(dataclasses.replace(CONFIG, beta=0.0), images, teacher)


def test_a_teacher_below_twice_chance_is_refused() -> None:
    images = balanced(toy.federation().train, 4, stream(0, "x"))
    with pytest.raises(UserError, match=r"zero-shot accuracy on the alignment images is 0.0%, below 2 x chance"):
        make_aligner(CONFIG, images, lambda _: knowing((torch.from_numpy(images.labels) + 1) % 3))


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


def digits(imbalance: float = 10) -> tuple[DataConfig, Federation]:
    data = DataConfig(source="digits", imbalance_factor=imbalance, clients=4)
    return data, build(data)


def test_rendered_alignment_images_are_none_of_the_teachers_training_images() -> None:
    """Both seeds are 0, and glyph i is a function of (stream, i, character): under one name 11 of 200 were equal."""
    data, fed = digits()
    images = alignment_set(AlignConfig(source="glyphs", per_class=20), fed, data)
    taught = {stored for stored, _ in prints(render_glyphs(200, 0, characters=DIGITS * 2 + LETTERS)[0])}
    asked = {stored for stored, _ in prints(unlabelled_images(ServerConfig(seed=0), data, fed))}
    drawn = {stored for stored, _ in prints(images)}
    assert len(drawn) == 200 and not drawn & taught and not drawn & asked and not asked & taught
    same_name = {stored for stored, _ in prints(glyph_set(fed.class_names, 20, 0)[0])}
    assert len(same_name & taught) == 11


def test_the_default_is_a_thousand_images_in_all_and_at_least_one_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(names: Sequence[str], per_class: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(per_class)
        return toy.federation().train, []

    monkeypatch.setattr("mllm_fl.stages.alignment_images.glyph_set", note)
    fed = toy.federation()
    for classes in (10, 100, 1000, 1203):
        names = tuple(map(str, range(classes)))
        many = dataclasses.replace(fed, train=dataclasses.replace(fed.train, class_names=names))
        alignment_set(AlignConfig(source="glyphs"), many, DataConfig())
    assert asked == [100, 10, 1, 1]


def test_imagenet_lts_validation_list_aligns_in_the_order_of_its_classes(tmp_path: Path) -> None:
    root = imagenet(tmp_path)
    lines = []
    for c, n in enumerate((3, 2, 4)):
        for i in range(n):
            (root / f"val{c}-{i}.png").write_bytes(encoded(noise(5000 + 100 * c + i, 50, 60)))
            lines.append(f"val{c}-{i}.png {c}\n")
    (root / "ImageNet_LT_val.txt").write_text("".join(lines))
    data = DataConfig(source="imagenet-lt", root=str(root), image_size=32, clients=2, min_size=0)
    fed = build(data)
    images = alignment_set(AlignConfig(source="val"), fed, data)
    assert images.class_counts() == [2, 2, 2] and images.class_names == fed.class_names  # all that every class has
    assert (images.mean, images.std) == (fed.train.mean, fed.train.std)
    assert images.read([0]).shape == (1, 3, 32, 32)
    assert alignment_set(AlignConfig(source="val", per_class=1), fed, data).class_counts() == [1, 1, 1]
    with pytest.raises(
        UserError, match="no image is left over: the clients hold all 10 that are at hand; cut a long tail"
    ):
        alignment_set(AlignConfig(), fed, data)
    with pytest.raises(UserError, match="'val' is ImageNet-LT's validation list, but data.source is 'digits'"):
        alignment_set(AlignConfig(source="val"), fed, DataConfig())


def test_alignment_images_are_normalised_like_the_clients(tmp_path: Path) -> None:
    """Not with constants of their own: the model has only ever seen the federation's."""
    data, plain = digits()
    fed = dataclasses.replace(plain, train=dataclasses.replace(plain.train, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    write_folder(tmp_path / "web", dict.fromkeys(fed.class_names, 2))
    for source in ("glyphs", "leftover", f"folder:{tmp_path / 'web'}"):
        images = alignment_set(AlignConfig(source=source, per_class=2), fed, data)
        assert (images.mean, images.std) == (fed.train.mean, fed.train.std), source
        x = images.read([3]).float() / 255
        expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
        assert torch.allclose(make_aligner(CONFIG, images, None).x[3], expected[0], atol=1e-6)


def momentum_by_hand(config: AlignConfig, w: Tree, task: Task, x: torch.Tensor, y: torch.Tensor, round: int) -> Tree:
    """Eq. (5) with momentum, and the draws of the stream (run, "align", round): a fresh permutation when less than a batch is left."""
    draws = stream(task.seed, "align", round)
    leaves = {k: v.clone().requires_grad_(k in task.trainable) for k, v in w.items()}
    velocity: dict[str, torch.Tensor] = {}
    order: list[int] = []
    for _ in range(config.steps):
        if len(order) < config.batch_size:
            order += torch.randperm(len(y), generator=draws).tolist()
        batch, order = order[: config.batch_size], order[config.batch_size :]
        seen = augment(x[batch], draws, padding=1, flip=True, mode="sample")
        loss = F.cross_entropy(task.forward(leaves, seen, train=False)[1], y[batch])
        for k, g in zip(task.trainable, torch.autograd.grad(loss, [leaves[k] for k in task.trainable]), strict=True):
            velocity[k] = config.momentum * velocity[k] + g if k in velocity else g
            leaves[k] = (leaves[k] - config.lr * velocity[k]).detach().requires_grad_(True)
    return {k: v.detach() for k, v in leaves.items()}


def test_several_steps_by_hand_with_momentum_augmentation_and_order() -> None:
    fed = toy.federation()
    task, w = toy.task(fed, seed=3)
    images = balanced(fed.train, 4, stream(0, "x"))
    config = dataclasses.replace(CONFIG, momentum=0.9, augment="crop-flip", beta=0.0)
    aligned, _ = make_aligner(config, images, None)(task, w, 7)
    by_hand = momentum_by_hand(config, w, task, images.normalised(range(12)), torch.from_numpy(images.labels), 7)
    for k in task.trainable:
        assert torch.allclose(aligned[k], by_hand[k], atol=1e-6), k


def test_the_temperature_reaches_both_softmaxes() -> None:
    """At T = 2 the gradient of KL with respect to the logits is (p - q) / 2, softmaxes of halved logits."""
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    q = torch.tensor([[0.0, 2.0, 0.0]])
    (grad,) = torch.autograd.grad(kl(q, logits, 2.0), logits)
    assert torch.allclose(grad, (torch.softmax(logits.detach() / 2, 1) - torch.softmax(q / 2, 1)) / 2, atol=1e-6)
    fed = toy.federation()
    task, w = toy.task(fed)
    images = balanced(fed.train, 4, stream(0, "x"))
    y = torch.from_numpy(images.labels)
    config = dataclasses.replace(CONFIG, steps=1, batch_size=12, temperature=2.0)
    _, loss = make_aligner(config, images, lambda _: knowing(y))(task, w, 1)
    out = task.forward(w, images.normalised(range(12)), train=False)[1]
    t, p = (knowing(y) / 2).log_softmax(1), (out / 2).log_softmax(1)
    assert loss == pytest.approx(
        float((F.cross_entropy(out, y) + (t.exp() * (t - p)).sum(1).mean()).detach()), abs=1e-6
    )


def test_the_accuracy_before_alignment_is_the_aggregated_models(tmp_path: Path) -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    config = FederateConfig(rounds=1, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    with RunFolder(tmp_path / "plain", {}) as run:
        federate(config, task, fed, w, run)
        plain = read_rows(run.path / "rounds.jsonl")[-1]["accuracy"]
    aligner = make_aligner(dataclasses.replace(CONFIG, lr=0.3, steps=30), balanced(fed.train, 4, stream(0, "x")), None)
    with RunFolder(tmp_path / "aligned", {}) as run:
        federate(config, task, fed, w, run, aligner=aligner)
        row = read_rows(run.path / "rounds.jsonl")[-1]
    assert row["accuracy_before_align"] == plain != row["accuracy"]


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
    for when, expected in (("every-round", [True, True, True]), ("end", [False, False, False])):
        aligner = make_aligner(dataclasses.replace(CONFIG, when=when), images, None)  # type: ignore[arg-type]
        with RunFolder(tmp_path / when, {}) as run:
            federate(config, task, fed, w, run, aligner=aligner)
            rows = read_rows(run.path / "rounds.jsonl")
        assert [r["align_loss"] is not None for r in rows] == expected
        assert (rows[-1]["accuracy_before_align"] is not None) == (when == "every-round")


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
    assert digest(state.w) != final["weights_sha256"] == digest(aligner(task, state.w, 3)[0])
    assert final["last"]["accuracy"] == evaluate(task, aligner(task, state.w, 3)[0], fed.test).scores(None)["accuracy"]
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


def test_leaves_that_a_method_deploys_otherwise_are_aligned_on_the_aligned_rest_and_not_fed_back(
    tmp_path: Path,
) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    config = FederateConfig(rounds=2, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    aligner = make_aligner(CONFIG, balanced(fed.train, 4, stream(0, "x")), None)
    broadcast = {}
    for method, otherwise in ((FedAvg(), []), (OwnHead(), list(task.head))):
        asked = dataclasses.replace(config, method=method)
        with RunFolder(tmp_path / type(method).__name__, {}) as run:
            state = federate(asked, task, fed, w, run, aligner=aligner)
            final = outcome(asked, task, state, fed.test, groups([20] * 3), run, aligner)
            row = read_rows(run.path / "rounds.jsonl")[-1]
        assert final["deployed_otherwise"] == otherwise and final["curve"] == "aligned"
        broadcast[type(method).__name__] = digest(state.w)
        shipped = delivered(method, task, state, aligner)
        assert final["weights_sha256"] == digest(shipped)
        assert (
            row["accuracy"] == final["last"]["accuracy"] == evaluate(task, shipped, fed.test).scores(None)["accuracy"]
        )
        for k in task.trainable:  # the rest is the broadcast one; the method's own head has moved by its own steps
            assert torch.equal(shipped[k], state.w[k]) == (k not in otherwise), k
    plain = method.deploy(task, state)
    assert digest(shipped) == digest(aligner(task, plain, 2, task.head)[0])
    assert all(bool((plain[k] == 0.25).all()) and not bool((shipped[k] == 0.25).any()) for k in task.head)
    assert broadcast["OwnHead"] == broadcast["FedAvg"]


@dataclasses.dataclass(frozen=True)
class Calibrated(FedAvg):
    """Like CCVR, it changes the head after the last aggregation."""

    concludes: ClassVar[bool] = True

    def conclude(self, task: Task, s: Server, answers: Iterable[tuple[int, Tree]]) -> Server:
        assert len(list(answers)) == len(task.population)
        return dataclasses.replace(s, w=s.w | {k: torch.full_like(s.w[k], 0.25) for k in task.head})


def test_a_head_that_is_calibrated_after_the_last_round_is_aligned_too(tmp_path: Path) -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    config = FederateConfig(rounds=1, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    aligner = make_aligner(CONFIG, balanced(fed.train, 4, stream(0, "x")), None)
    with RunFolder(tmp_path / "plain", {}) as run:
        rounds = federate(config, task, fed, w, run, aligner=aligner).w
    asked = dataclasses.replace(config, method=Calibrated())
    for _ in range(2):  # the second call resumes after the last round
        with RunFolder(tmp_path / "calibrated", {}) as run:
            state = federate(asked, task, fed, w, run, aligner=aligner)
        calibrated = rounds | {k: torch.full_like(rounds[k], 0.25) for k in task.head}
        assert digest(state.w) == digest(aligner(task, calibrated, 1, task.head)[0])
        assert digest(delivered(Calibrated(), task, state, aligner)) == digest(state.w)  # and not a third time


def test_aligned_at_the_end_is_what_aligning_the_finished_run_gives_for_a_method_with_its_own_head(
    tmp_path: Path,
) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    config = FederateConfig(
        rounds=2, clients_per_round=2, method=OwnHead(), local=LocalConfig(epochs=1, augment="none")
    )
    aligner = make_aligner(dataclasses.replace(CONFIG, when="end"), balanced(fed.train, 4, stream(0, "x")), None)
    with RunFolder(tmp_path / "plain", {}) as run:
        finished = OwnHead().deploy(task, federate(config, task, fed, w, run))
    with RunFolder(tmp_path / "end", {}) as run:
        state = federate(config, task, fed, w, run, aligner=aligner)
    assert digest(delivered(OwnHead(), task, state, aligner)) == digest(aligner(task, finished, 2)[0])


@pytest.mark.parametrize(
    ("field", "value"), [("beta", -1.0), ("temperature", 0.0), ("lr", 0.0), ("steps", 0), ("per_class", 0)]
)
def test_out_of_range_values_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^align.{field}: "):
        AlignConfig(**{field: value})  # type: ignore[arg-type]
