"""CReFF's hooks as the paper tells them: what a client answers and when, what the server keeps, what is sent and what is deployed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests import toy
from torch import Tensor

from mllm_fl.algorithms.base import FedAvg, Server, Shard, Task, Update
from mllm_fl.algorithms.creff import CReFF
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError
from mllm_fl.matching import head_gradient
from mllm_fl.trees import Tree, digest, nbytes

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05)
FEW = CReFF(features=4, match_steps=5, head_epochs=3)


def client(classes: tuple[int, ...] = (0, 1, 2)) -> ImageSet:
    """Five images of each of these of the toy's three classes."""
    every = toy.images(5)
    return every.subset([i for i, c in enumerate(every.labels) if c in classes])


def a_round(method: CReFF, sets: list[ImageSet], rounds: int = 1) -> tuple[Task, Server, list[Update]]:
    task, w = toy.task(toy.federation())
    state, updates, memory = method.init(task, w), list[Update](), dict[int, Tree]()
    for t in range(1, rounds + 1):
        msg, updates = method.broadcast(state), []
        for k, images in enumerate(sets):
            update, memory[k] = train_client(
                task, method, msg, memory.get(k, {}), Shard(k, t, images, task.seed), LOCAL
            )
            assert memory[k] == {}
            updates.append(update)
        state = dataclasses.replace(method.server(task, state, updates), round=t)
    return task, state, updates


def test_a_client_answers_for_its_classes_at_the_round_start_model_before_local_training() -> None:
    """Without DSA and with all images in every draw the answer is the closed form on all of a class, by hand."""
    method = CReFF(features=4, dsa=False)
    task, w = toy.task(toy.federation())
    state, images = method.init(task, w), client((0, 2))
    shard = Shard(0, 1, images, task.seed)
    update, _ = train_client(task, method, method.broadcast(state), {}, shard, LOCAL)
    assert sorted(update.extra) == ["grad/0/bias", "grad/0/weight", "grad/2/bias", "grad/2/weight"]
    for c in (0, 2):
        positions = [i for i, label in enumerate(images.labels) if label == c]
        feature = task.forward(w, shard.x(positions), train=False)[0]  # w^t, evaluation mode
        y = torch.full((5,), c)
        wanted = head_gradient(
            feature, y, state.extra["head/weight"], state.extra["head/bias"]
        )  # h, not w^t's own head
        assert torch.allclose(update.extra[f"grad/{c}/weight"], wanted[0], atol=1e-6)
        assert torch.allclose(update.extra[f"grad/{c}/bias"], wanted[1], atol=1e-6)


def test_dsa_and_draws_change_the_answer_and_come_from_their_own_streams() -> None:
    images = client((1,))
    plain = a_round(dataclasses.replace(FEW, dsa=False), [images])[2][0].extra
    augmented = a_round(FEW, [images])[2][0].extra
    assert not torch.allclose(plain["grad/1/weight"], augmented["grad/1/weight"], atol=1e-4)
    fewer = a_round(dataclasses.replace(FEW, dsa=False, images=2, repeats=1), [images])[2][0].extra
    assert not torch.allclose(plain["grad/1/weight"], fewer["grad/1/weight"], atol=1e-4)
    assert digest(augmented) == digest(a_round(FEW, [images])[2][0].extra)


def test_local_training_and_the_global_weights_are_fedavgs() -> None:
    """h is never fed back into w: three rounds of CReFF leave w bit for bit where FedAvg does."""
    sets = [client(), client((0,)), client((1, 2))]
    task, state, _ = a_round(FEW, sets, rounds=3)
    w = toy.task(toy.federation())[1]
    for t in range(1, 4):
        updates = [
            train_client(task, FedAvg(), FedAvg().broadcast(Server(w)), {}, Shard(k, t, s, task.seed), LOCAL)[0]
            for k, s in enumerate(sets)
        ]
        w = FedAvg().server(task, Server(w), updates).w
    assert digest(state.w) == digest(w)


def test_deployed_is_the_backbone_of_w_with_h() -> None:
    task, state, _ = a_round(FEW, [client()])
    deployed = FEW.deploy(task, state)
    assert torch.equal(deployed["classifier.weight"], state.extra["head/weight"])
    assert torch.equal(deployed["classifier.bias"], state.extra["head/bias"])
    assert not torch.equal(deployed["classifier.weight"], state.w["classifier.weight"])
    assert all(torch.equal(deployed[k], v) for k, v in state.w.items() if k not in task.head)
    assert digest(FEW.broadcast(state).extra) == digest(
        {k: state.extra[k] for k in ("head/weight", "head/bias")}
    )  # the features stay at the server


def test_features_persist_and_those_of_unseen_classes_stay() -> None:
    task, w = toy.task(toy.federation())
    before = FEW.init(task, w).extra["features"]
    assert before.shape == (3 * 4, 8) and abs(float(before.mean())) < 0.3 and 0.8 < float(before.std()) < 1.2
    _, state, _ = a_round(FEW, [client((0, 2)), client((2,))])
    after = state.extra["features"]
    assert torch.equal(after[4:8], before[4:8])  # class 1
    assert not torch.equal(after[:4], before[:4]) and not torch.equal(after[8:], before[8:])
    _, two, _ = a_round(FEW, [client((0, 2)), client((2,))], rounds=2)
    assert torch.equal(two.extra["features"][4:8], before[4:8])
    assert not torch.equal(two.extra["features"][:4], after[:4])  # goes on from where the last round left off


def test_the_head_is_a_new_one_every_round() -> None:
    """Zero epochs leave the fresh heads themselves: three of them, all different."""
    method = dataclasses.replace(FEW, head_epochs=0)
    task, w = toy.task(toy.federation())
    heads = [method.init(task, w).extra["head/weight"]]
    heads += [a_round(method, [client()], rounds=r)[1].extra["head/weight"] for r in (1, 2)]
    assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    trained = a_round(dataclasses.replace(method, head_epochs=1), [client()])[1].extra["head/weight"]
    assert not torch.equal(trained, heads[1]) and torch.allclose(trained, heads[1], atol=0.5)


def test_the_mean_of_gradients_does_not_weigh_clients() -> None:
    task, w = toy.task(toy.federation())
    state = FEW.init(task, w)
    g = {f"grad/{c}/{leaf}": torch.randn(s, generator=torch.Generator().manual_seed(c))
         for c in (0, 1) for leaf, s in (("weight", (3, 8)), ("bias", (3,)))}  # fmt: skip

    def sent(weights: tuple[float, float]) -> Tensor:
        one = {f"grad/0/{leaf}": g[f"grad/0/{leaf}"] for leaf in ("weight", "bias")}
        two = {f"grad/0/{leaf}": g[f"grad/1/{leaf}"] for leaf in ("weight", "bias")}
        updates = [Update(k, w, n, e, {}) for k, n, e in zip((0, 1), weights, (one, two), strict=True)]
        return FEW.server(task, state, iter(updates)).extra["features"]

    assert torch.equal(sent((1.0, 1.0)), sent((1.0, 1000.0)))


def test_if_nobody_answers_for_any_class_the_features_stay_and_the_head_is_new() -> None:
    task, w = toy.task(toy.federation())
    state = FEW.init(task, w)
    after = FEW.server(task, state, iter([Update(0, w, 1.0, {}, {})]))
    assert torch.equal(after.extra["features"], state.extra["features"])
    assert not torch.equal(after.extra["head/weight"], state.extra["head/weight"])


def test_bytes_are_those_that_are_counted() -> None:
    for classes in ((0, 1, 2), (1,)):
        task, state, updates = a_round(FEW, [client(classes)])
        assert nbytes(updates[0].extra) == FEW.upload_bytes(task, len(classes)) == len(classes) * 4 * 3 * (8 + 1)
        assert nbytes(FEW.broadcast(state).extra) == FEW.download_bytes(task) == 4 * 3 * (8 + 1)


def test_without_retraining_it_is_fedavg_and_sends_nothing_more() -> None:
    method = CReFF(retrain=False)
    task, state, updates = a_round(method, [client(), client((1,))], rounds=2)
    assert state.extra == {} and updates[0].extra == {} and method.broadcast(state).extra == {}
    assert method.upload_bytes(task, 3) == method.download_bytes(task) == 0
    assert method.upload_form(task) == {} and len(FEW.upload_form(task)) == 3
    assert digest(method.deploy(task, state)) == digest(state.w)


def test_server_numbers_come_from_named_streams_alone() -> None:
    a = a_round(FEW, [client()], rounds=2)[1]
    torch.manual_seed(5)
    assert digest(a.extra) == digest(a_round(FEW, [client()], rounds=2)[1].extra)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": 0}, "federate.method.features: CReFF needs features in \\[1, inf\\), not 0"),
        ({"head_batch": 0}, "federate.method.head_batch"),
        (
            {"match_lr": -0.1},
            "federate.method.match_lr: CReFF needs match_lr in \\[0, inf\\), not -0.1; the default is 0.1",
        ),
        ({"head_lr": float("nan")}, "federate.method.head_lr"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CReFF(**fields)  # type: ignore[arg-type]
