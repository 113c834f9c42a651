"""FedYoYo (arXiv:2503.06916) in NumPy: blended prior from data-effective numbers, logit adjustment on two views, self-distillation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.fedyoyo import FedYoYo
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
            ramp = min((t - 1) / method.warmup, 1.0)
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
            kept = 0.9 * kept + 0.1 * fresh
    return w, kept


@pytest.mark.parametrize("strong", [True, False])
def test_three_rounds_in_numpy(strong: bool) -> None:
    world = plain.world()
    method = FedYoYo(tau=0.8, gamma=0.3, strength=1.5, temperature=1.7, warmup=2, strong=strong)
    w, kept = federation(world, 4, method)
    played = play(method, world, 4, local=plain.LOCAL)
    plain.near(played.state.w, w, 3e-3 if strong else 1e-4)
    assert np.allclose(played.state.extra["effective"].numpy(), kept, rtol=1e-2)
    assert not any(played.memory.values())


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
