"""What clients know of the class counts, in NumPy: their own, or the sum of the last counts that each client seen so far has sent."""

from __future__ import annotations

import numpy as np
import torch
from tests.oracles import plain

from mllm_fl.algorithms.logitadjust import LogitAdjust
from mllm_fl.conformance.play import play
from mllm_fl.conformance.toy import World


def histograms(world: World) -> list[plain.Array]:
    """The counts of each client."""
    return [np.bincount(plain.seen(c)[1], minlength=3).astype(float) for c in world.clients]


def known(world: World, rounds: int, absent: set[tuple[int, int]]) -> list[list[plain.Array]]:
    """By round and client: the global counts as far as known when the round begins, at least the client's own."""
    own, seen, out = histograms(world), set[int](), []
    for t in range(1, rounds + 1):
        total = np.sum([own[k] for k in seen], axis=0) if seen else np.zeros(3)
        out.append([np.maximum(total, own[k]) for k in range(3)])
        seen |= {k for k in range(3) if (t, k) not in absent}
    return out


def test_the_server_sums_what_clients_have_sent() -> None:
    world, absent = plain.world(), {(1, 2), (2, 0), (3, 1)}
    played = play(LogitAdjust(), world, 4, local=plain.LOCAL, absent=absent)
    own = histograms(world)
    expected = [np.zeros(3), own[0] + own[1], np.sum(own, 0), np.sum(own, 0)]
    for msg, counts in zip(played.sent, expected, strict=True):
        assert np.array_equal(msg.extra["counts"].numpy(), counts)
    assert not any(played.memory.values())
    assert play(LogitAdjust(prior="local"), world, 2, local=plain.LOCAL).sent[-1].extra == {}


def test_shares_sum_to_one() -> None:
    counts = torch.tensor([3.0, 0.0, 1.0])
    assert LogitAdjust.shares({"counts": counts}).tolist() == [0.75, 0.0, 0.25]


def test_a_local_prior_sends_nothing() -> None:
    """Global: one float32 a class each way. Local: nothing, and no leaf is taken."""
    task = plain.world().task
    for method, size in ((LogitAdjust(), 12), (LogitAdjust(prior="local"), 0)):
        assert method.upload_bytes(task, 2) == method.download_bytes(task) == size
        assert bool(method.upload_form(task)) == (size > 0)
    played = play(LogitAdjust(prior="local"), plain.world(), 1, local=plain.LOCAL)
    assert [u.extra for u in played.updates[0]] == [{}, {}, {}]
