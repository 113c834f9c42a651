"""CLIP2FL beside CReFF: what distillation and contrast add, what they need, and that without them nothing is left but CReFF."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests import toy
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Server, Shard, Task
from mllm_fl.algorithms.clip2fl import CLIP2FL
from mllm_fl.algorithms.creff import CReFF
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
from mllm_fl.losses import cross_entropy
from mllm_fl.trees import Tree, digest

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05)
FEW = CLIP2FL(features=4, match_steps=5, head_epochs=3)
WIDTH = 8  # of the toy network's feature


def given(width: int = WIDTH) -> tuple[Task, Tree]:
    """The toy task with text embeddings of this width."""
    task, w = toy.task(toy.federation())
    texts = F.normalize(torch.randn(3, width, generator=torch.Generator().manual_seed(1)), dim=1)
    return dataclasses.replace(task, texts=texts), w


def teacher(images: ImageSet) -> Tensor:
    return 3 * F.one_hot(torch.from_numpy(images.labels), 3).float() + torch.arange(3.0)


def play(method: Algorithm, rounds: int = 2) -> Server:
    """Two clients, one of them without class 1."""
    task, w = given()
    images = toy.images(5)
    sets = [images, images.subset([i for i, c in enumerate(images.labels) if c != 1])]
    state = method.init(task, w)
    for t in range(1, rounds + 1):
        msg, updates = method.broadcast(state), []
        for k, held in enumerate(sets):
            update, memory = train_client(task, method, msg, {}, Shard(k, t, held, task.seed, teacher(held)), LOCAL)
            assert memory == {} and all(name.startswith("grad/") for name in update.extra)
            updates.append(update)
        state = dataclasses.replace(method.server(task, state, updates), round=t)
    return dataclasses.replace(state, extra=state.extra | {"deployed": method.deploy(task, state)["classifier.weight"]})


@pytest.mark.parametrize("dsa", [True, False])
def test_without_its_two_terms_it_is_creff_bit_for_bit(dsa: bool) -> None:
    """At values that are nobody's defaults, so that a field that one of them forgets is seen."""
    fields = {
        "features": 4, "match_steps": 5, "match_lr": 0.3, "head_epochs": 3, "head_lr": 0.07, "head_batch": 5, "repeats": 2, "images": 3,
    }  # fmt: skip
    mine = play(CLIP2FL(alpha=0.0, contrast=0.0, dsa=dsa, **fields))  # type: ignore[arg-type]
    theirs = play(CReFF(dsa=dsa, **fields))  # type: ignore[arg-type]
    assert digest(mine.w) == digest(theirs.w) and digest(mine.extra) == digest(theirs.extra)


def test_without_retraining_either_it_is_fedavg_bit_for_bit() -> None:
    mine, theirs = play(CLIP2FL(**CLIP2FL.neutral)), play(FedAvg())
    task = given()[0]
    assert CLIP2FL(retrain=False).upload_form(task) == {} and len(CLIP2FL().upload_form(task)) == 3
    assert digest(mine.w) == digest(theirs.w) and digest(mine.extra) == digest(theirs.extra)


def test_each_term_acts_in_its_own_place() -> None:
    """Distillation moves local training and leaves the first round's gradients; contrast moves the features and leaves the weights."""
    creff = play(CReFF(features=4, match_steps=5, head_epochs=3), rounds=1)
    distilled = play(dataclasses.replace(FEW, contrast=0.0), rounds=1)
    assert digest(distilled.w) != digest(creff.w)
    assert digest(distilled.extra) == digest(creff.extra)
    contrasted = play(dataclasses.replace(FEW, alpha=0.0, contrast=0.1), rounds=1)
    assert digest(contrasted.w) == digest(creff.w)
    assert not torch.equal(contrasted.extra["features"], creff.extra["features"])


def test_the_features_of_a_class_that_nobody_holds_are_drawn_to_its_text() -> None:
    task, w = given()
    method = dataclasses.replace(FEW, alpha=0.0, contrast=1.0)
    start = method.init(task, w)
    images = toy.images(5)
    held = images.subset([i for i, c in enumerate(images.labels) if c == 0])
    update, _ = train_client(task, method, method.broadcast(start), {}, Shard(0, 1, held, 0), LOCAL)
    ended = method.server(task, start, [update]).extra["features"]
    assert task.texts is not None
    for c in (1, 2):
        block, text = slice(4 * c, 4 * c + 4), task.texts[c]
        assert ((ended[block] @ text) > (start.extra["features"][block] @ text)).all()


def objective(method: CLIP2FL, logits: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """The objective on logits of our own making."""

    class Fixed(Task):
        def forward(self, w: Tree, x: Tensor, *, train: bool = True) -> tuple[Tensor, Tensor]:
            return logits, logits

    task = Fixed(torch.nn.Identity(), ("a", "b", "c"), (2,), 0)
    return method.objective(task, {}, Broadcast({}, {}), {"each/teacher": rows}, torch.zeros(2, 3, 8, 8), y)


def test_distillation_gradient_is_the_temperature_times_p_minus_q() -> None:
    logits = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.5, 3.0]], requires_grad=True)
    rows, y = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 4.0]]), torch.tensor([0, 1])
    (g,) = torch.autograd.grad(objective(CLIP2FL(alpha=0.5, temperature=2.0), logits, rows, y), logits)
    p, q = (logits / 2).softmax(1), (rows / 2).softmax(1)
    plain = (logits.softmax(1) - F.one_hot(y, 3)) / 2
    assert torch.allclose(g, plain + 0.5 * 2 * (p - q) / 2, atol=1e-6)


def test_distillation_is_zero_where_logits_agree_up_to_a_constant() -> None:
    logits, y = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.5, 3.0]]), torch.tensor([0, 1])
    agreeing = objective(CLIP2FL(), logits, logits + torch.tensor([[7.0], [-2.0]]), y)
    assert torch.allclose(agreeing, cross_entropy(logits, y), atol=1e-5)
    assert objective(CLIP2FL(), logits, logits.flip(1), y) > cross_entropy(logits, y) + 0.1


def test_each_image_is_taught_by_its_own_row() -> None:
    """A teacher whose rows tell the label: whatever the shuffling, the rows of a batch are those of its images."""
    batches: list[int] = []

    class Watched(CLIP2FL):
        def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
            assert torch.equal(mine["each/teacher"].argmax(1), y)
            batches.append(len(y))
            return super().objective(task, w, msg, mine, x, y)

    task, w = given()
    images = toy.images(5)
    method = Watched(features=2, match_steps=1, head_epochs=1)
    rows = F.one_hot(torch.from_numpy(images.labels), 3).float()
    train_client(task, method, method.broadcast(method.init(task, w)), {}, Shard(0, 1, images, 0, rows), LOCAL)
    assert batches == [8, 7]


def test_without_distillation_no_logits_are_carried() -> None:
    task, w = given()
    images = toy.images(2)
    shard = Shard(0, 1, images, 0, teacher(images))
    for alpha, retrain in ((0.0, True), (0.5, True), (0.5, False), (0.0, False)):
        method = dataclasses.replace(FEW, alpha=alpha, retrain=retrain)
        mine = method.begin(task, method.broadcast(method.init(task, w)), {}, shard)
        assert ("each/teacher" in mine, "grad/0/bias" in mine) == (alpha > 0, retrain)


def test_what_is_missing_is_named() -> None:
    task, w = given()
    without = dataclasses.replace(task, texts=None)
    with pytest.raises(UserError, match="no text embeddings"):
        FEW.init(without, w)
    dataclasses.replace(FEW, contrast=0.0).init(without, w)
    with pytest.raises(UserError, match="no teacher's logits"):
        FEW.begin(task, FEW.broadcast(FEW.init(task, w)), {}, Shard(0, 1, toy.images(2), 0))
    narrow, w = given(width=5)
    with pytest.raises(UserError, match=r"model.adapter_dim: .* width 8 .* width 5; .*model.adapter_dim = 5"):
        FEW.init(narrow, w)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alpha": -1.0}, "federate.method.alpha: CLIP2FL needs alpha in \\[0, inf\\), not -1.0; .*0.0 is FedAvg"),
        ({"temperature": 0.0}, "federate.method.temperature: CLIP2FL needs temperature in \\[0.001, inf\\), not 0.0"),
        ({"contrast": float("inf")}, "federate.method.contrast"),
        ({"features": 0}, "federate.method.features: CLIP2FL needs features in \\[1, inf\\), not 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CLIP2FL(**fields)  # type: ignore[arg-type]
