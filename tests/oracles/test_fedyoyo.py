"""FedYoYo (arXiv:2503.06916) in NumPy: blended prior from data-effective numbers, logit adjustment on two views, self-distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.fedyoyo import FedYoYo, smoothed, tamed
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.conformance.toy import World
from mllm_fl.data.strong import DRAWS, strong_view
from mllm_fl.seeds import stream
from mllm_fl.statistics import effective_numbers


def effective(features: plain.Array, y: plain.Array, classes: int, batches: list[list[int]]) -> plain.Array:
    """Per batch and class 1 / (a' R a), R the cosines of centred features, a = 1/n; a single image counts 1."""
    unit = np.zeros_like(features)
    for i, c in enumerate(y):
        centred = features[i] - features[y == c].mean(0)
        unit[i] = centred / max(float(np.sqrt((centred**2).sum())), 1e-12)
    out = np.zeros(classes)
    for batch in batches:
        for c in set(y[batch].tolist()):
            rows = unit[[i for i in batch if y[i] == c]]
            a = np.full(len(rows), 1 / len(rows))
            out[c] += 1.0 if len(rows) == 1 else 1 / max(float(a @ (rows @ rows.T) @ a), 1e-6)
    return out


def federation(world: World, rounds: int, method: FedYoYo) -> tuple[plain.W, plain.Array]:
    """The rounds in NumPy; strong views and the order of batches are what the named streams hand out."""
    w, sizes = plain.of(world.w), [len(c) for c in world.clients]
    held = [c.normalised(range(len(c))) for c in world.clients]
    data = [plain.seen(c) for c in world.clients]
    kept = np.zeros(3)
    for t in range(1, rounds + 1):
        e_global = kept if t > 1 else np.ones(3)
        local, sent = [], []
        for k, (m, y) in enumerate(data):
            own = np.bincount(y, minlength=3) / len(y)
            prior = (1 - method.gamma) * e_global / e_global.sum() + method.gamma * own
            order = torch.randperm(len(y), generator=stream(world.task.seed, "effective", t, k)).split(32)
            sent.append(effective(m * w["scale"], y, 3, [b.tolist() for b in order]))
            ramp = min(t / method.warmup, 1.0)
            draws = torch.rand(len(y), DRAWS, generator=stream(world.task.seed, "strong", t, k))
            m_strong = strong_view(held[k], draws).double().numpy().mean((2, 3))
            shift = method.tau * np.log(np.maximum(prior, 1e-9))
            v = w
            for _ in range(plain.STEPS):
                z_weak = plain.logits(v, m) + shift  # of the step's own weights, and held still while differentiating
                right, target = z_weak.argmax(1) == y, plain.softmax(z_weak / method.temperature)

                def loss(u: plain.W, m: plain.Array = m, y: plain.Array = y) -> float:
                    weak, strong = (plain.logits(u, views) + shift for views in (m, m_strong))  # noqa: B023
                    if not method.strong:
                        return plain.ce(weak, y)
                    out = plain.ce(np.concatenate([weak, strong]), np.concatenate([y, y]))
                    q = target[right]  # noqa: B023
                    gap = q * (np.log(q) - plain.log_softmax(strong[right] / method.temperature))  # noqa: B023
                    return out + (method.strength * ramp * float(gap.sum(1).mean()) if right.any() else 0.0)  # noqa: B023

                v = plain.descend(loss, v, 1)
            local.append(v)
        w = plain.mean(sizes, local)
        fresh = 1 + np.sum(sent, 0)
        if t == 1:
            sane = fresh[fresh <= 1e4]
            kept = np.where(fresh > 1e4, sane.mean(), fresh) if len(sane) else fresh
        else:
            new = 0.9 * kept + 0.1 * fresh
            kept = np.where(np.abs(new - kept) / kept > 100, kept, new)
    return w, kept


@pytest.mark.parametrize("strong", [True, False])
def test_three_rounds_in_numpy(strong: bool) -> None:
    world = plain.world()
    method = FedYoYo(tau=0.8, gamma=0.3, strength=1.5, temperature=1.7, warmup=3, strong=strong)
    w, kept = federation(world, 4, method)
    played = play(method, world, 4, local=plain.LOCAL)
    plain.near(played.state.w, w, 3e-3 if strong else 1e-4)
    assert np.allclose(played.state.extra["effective"].numpy(), kept, rtol=1e-2)
    assert not any(played.memory.values())


def test_exploding_numbers_by_hand() -> None:
    """First: above 1e4 the mean of the others. Later: 0.9 old + 0.1 fresh, unless that is more than 100 times the old away."""
    first = tamed(torch.tensor([1e4, 1.5e4, 4.0, 1e6]))
    assert first.tolist() == [1e4, 5002.0, 4.0, 5002.0]
    assert tamed(torch.tensor([2e4, 1e6])).tolist() == [2e4, 1e6]  # nothing to go by
    old = torch.tensor([10.0, 10.0, 10.0, 1.0])
    got = smoothed(old, torch.tensor([20.0, 10020.0, 1e6, 1000.0]))
    assert torch.allclose(got, torch.tensor([11.0, 10.0, 10.0, 100.9]))  # 1011 - 10 is too much, 100.9 - 1 is not
    edge = smoothed(torch.tensor([10.0]), torch.tensor([10010.0]))
    assert float(edge) == 1010.0  # exactly 100 times the old one more


def test_a_class_of_exactly_two_does_not_take_the_prior() -> None:
    """A client with two images of class 2, all that there are: e explodes in every round, and the prior stays near the shares."""
    base, world = toy.images(12, seed=3, name="two"), plain.world()
    held = [base.subset([*range(12), *range(12, 20)]), base.subset([0, 1, 2, 12, 13, 14, 24, 25])]
    played = play(FedYoYo(strong=False), world.holding(held), 5, local=plain.LOCAL)
    sent = [u.extra["effective"] for r in played.updates for u in r if u.client == 1]
    assert all(float(e[2]) > 1e4 for e in sent)
    assert all(float(msg.extra["prior"][2]) < 0.5 for msg in played.sent)


def test_nobody_answers_in_the_first_round() -> None:
    """All updates of round 1 are lost: the prior of round 2 is uniform again, not 0 / 0, and round 2 makes the first numbers."""
    world = plain.world()
    lost = {(1, k) for k in range(3)}
    played = play(FedYoYo(strong=False), world, 3, local=plain.LOCAL, lost=lost)
    assert played.sent[1].extra["prior"].tolist() == pytest.approx([1 / 3] * 3)
    total = 1 + torch.stack([u.extra["effective"] for u in played.updates[1]]).sum(0)
    assert torch.allclose(played.sent[2].extra["prior"], tamed(total) / tamed(total).sum())


def test_the_distillation_grows_with_the_rounds() -> None:
    """1 / warmup in the first round, 1 from round ``warmup`` on."""
    world, method = plain.world(), FedYoYo(warmup=4)
    msg = method.broadcast(method.init(world.task, world.w))
    ramps = [float(method.begin(world.task, msg, {}, world.shard(0, t))["ramp"]) for t in (1, 2, 4, 9)]
    assert ramps == [0.25, 0.5, 1.0, 1.0]


def test_what_a_client_of_many_images_and_of_one_begins_with() -> None:
    """Forty images pass in batches of 32 of the stream's order; one image is all of its client's own prior."""
    world, method = plain.world(sizes=(40, 1)), FedYoYo(gamma=0.5)
    msg = method.broadcast(method.init(world.task, world.w))
    m, y = plain.seen(world.clients[0])
    order = torch.randperm(40, generator=stream(world.task.seed, "effective", 1, 0)).tolist()
    wanted = effective(m * plain.of(world.w)["scale"], y, 3, [order[:32], order[32:]])
    got = method.begin(world.task, msg, {}, world.shard(0, 1))
    assert np.allclose(got["effective"].numpy(), wanted, rtol=1e-3)
    alone = method.begin(world.task, msg, {}, world.shard(1, 1))
    c = int(world.clients[1].labels[0])
    assert alone["prior"].tolist() == pytest.approx([0.5 / 3 + 0.5 * (k == c) for k in range(3)])
    assert alone["effective"].tolist() == [float(k == c) for k in range(3)]


def test_no_image_is_classified_rightly() -> None:
    """Nothing to distil: the loss is the cross-entropy of both views, not 0 / 0."""
    world, method = plain.world(), FedYoYo(tau=1.0, gamma=0.0, warmup=1)
    msg, shard = method.broadcast(method.init(world.task, world.w)), world.shard(0, 1)
    w = world.w | {"classifier.bias": torch.tensor([60.0, 0.0, 0.0])}
    mine = method.begin(world.task, msg, {}, shard)
    wrong = [i for i, c in enumerate(shard.y.tolist()) if c != 0]
    x, y = shard.x(wrong), shard.y[wrong]
    loss = method.objective(world.task, w, msg, {**mine, "each/draws": mine["each/draws"][wrong]}, x, y)
    assert float(loss) == pytest.approx(60.0, abs=2.0)


def test_effective_numbers_by_loops_and_by_hand() -> None:
    """Opposite features: mean unit vector 0, so 1 / 1e-6. Two alike of three: 1 / ||mean||^2."""
    rng = np.random.default_rng(1)
    features, y = rng.normal(0, 1, (9, 4)), np.array([0, 0, 0, 1, 1, 1, 1, 2, 0])
    order = [[0, 3, 8, 4], [1, 2, 5, 6, 7]]
    got = effective_numbers(
        torch.from_numpy(features).float(), torch.from_numpy(y), 4, [torch.tensor(b) for b in order]
    )
    assert np.allclose(got.numpy(), effective(features, y, 4, order), rtol=1e-4)
    assert got[3] == 0
    two = effective_numbers(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0]), 1, [torch.tensor([0, 1])])
    assert float(two) == pytest.approx(1e6)
