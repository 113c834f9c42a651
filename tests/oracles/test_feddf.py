"""FedDF (arXiv:2006.07242, Algorithm 1, eq. 1) in NumPy: Adam with a cosine and a clipped gradient on KL(ensemble || student)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import Server, Update
from mllm_fl.algorithms.distilling import lessons
from mllm_fl.algorithms.feddf import FedDF
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.errors import UserError
from mllm_fl.trees import digest


def divergence(teachers: list[plain.W], w: plain.W, m: plain.Array, temperature: float) -> float:
    """KL(q || p), q = softmax(mean of the teachers' logits / T), p = softmax(student / T), mean over images."""
    log_q = plain.log_softmax(np.mean([plain.logits(v, m) for v in teachers], 0) / temperature)
    log_p = plain.log_softmax(plain.logits(w, m) / temperature)
    return float((np.exp(log_q) * (log_q - log_p)).sum(1).mean())


@pytest.mark.parametrize(
    ("max_norm", "temperature", "size", "t"), [(5.0, 1.0, 1000, 1), (0.01, 1.0, 5, 1), (5.0, 2.5, 5, 3)]
)
def test_server_step_in_numpy(max_norm: float, temperature: float, size: int, t: int) -> None:
    """Round ``t`` is the server's state after t - 1 rounds; the order of images is what its named stream hands out."""
    world, steps, lr = plain.world(("unlabelled",)), 6, 0.05
    assert world.task.unlabelled is not None
    m, _ = plain.seen(world.task.unlabelled)
    sent, images = plain.moved(world.w, [0.5, 1.5, 2.0]), [16.0, 11.0, 7.0]
    teachers = [plain.of(s) for s in sent]
    w = plain.mean(images, teachers)
    first = {k: 0 * v for k, v in w.items()}
    second = dict(first)
    clipped, draws = 0, world.task.stream("distil", t)
    order = [b.numpy() for _ in range(steps) for b in torch.randperm(len(m), generator=draws).split(size)]
    for i in range(steps):
        g = plain.slope(partial(divergence, teachers, m=m[order[i]], temperature=temperature), w)
        norm = float(np.sqrt(sum((v**2).sum() for v in g.values())))
        clipped += norm > max_norm
        g = {k: v * min(1.0, max_norm / norm) for k, v in g.items()}
        first = {k: 0.9 * first[k] + 0.1 * g[k] for k in w}
        second = {k: 0.999 * second[k] + 0.001 * g[k] ** 2 for k in w}
        pace = lr * (1 + np.cos(np.pi * i / steps)) / 2
        for k in w:
            root = np.sqrt(second[k] / (1 - 0.999 ** (i + 1))) + 1e-8
            w[k] = w[k] - pace * first[k] / (1 - 0.9 ** (i + 1)) / root
    assert (clipped > 0) == (max_norm < 1)
    method = FedDF(steps=steps, batch_size=size, lr=lr, temperature=temperature, max_norm=max_norm)
    updates = [Update(k, s, n, {}, {}) for k, (s, n) in enumerate(zip(sent, images, strict=True))]
    plain.near(
        method.server(world.task, Server(world.w, round=t - 1), iter(updates)).w, w, 2e-4
    )  # Adam divides small by small


def test_identical_teachers_leave_the_student() -> None:
    """The student is the teacher: zero loss, zero gradient, and Adam stands still."""
    world = plain.world(("unlabelled",))
    sent = plain.moved(world.w, [1.0])[0]
    updates = [Update(k, sent, 3.0, {}, {}) for k in range(2)]
    moved = FedDF(steps=1, batch_size=1000, lr=1e-3).server(world.task, Server(world.w), iter(updates)).w
    assert all(float((moved[k] - sent[k]).abs().max()) <= 1.01e-3 for k in sent)  # one step of Adam on rounding at most
    gap = divergence([plain.of(sent)] * 2, plain.of(sent), plain.seen(world.test)[0], 1.0)
    assert abs(gap) < 1e-12


def test_no_step_is_the_weighted_mean() -> None:
    world = plain.world(("unlabelled",))
    sent = plain.moved(world.w, [1.0, 2.0])
    updates = [Update(k, s, w, {}, {}) for k, (s, w) in enumerate(zip(sent, (1.0, 3.0), strict=True))]
    state = FedDF(steps=0).server(world.task, Server(world.w), iter(updates))
    plain.near(state.w, plain.mean([1, 3], [plain.of(s) for s in sent]), 1e-6)


def test_statistics_move_to_the_servers_images() -> None:
    """The student trains in training mode: after some steps its running mean is that of the unlabelled images, not the clients'."""
    world = toy.world(("unlabelled",))
    state = play(FedDF(steps=60, batch_size=1000, lr=1e-6), world, 1).state.w
    assert world.task.unlabelled is not None
    x = world.task.unlabelled.normalised(range(len(world.task.unlabelled)))
    maps = torch.nn.functional.conv2d(x, state["backbone.conv.weight"], stride=2, padding=1)
    assert torch.allclose(state["backbone.bn.running_mean"], maps.mean((0, 2, 3)), atol=1e-2)
    assert int(state["backbone.bn.num_batches_tracked"]) > 60


def test_batches_are_a_named_stream_per_round_and_teachers_do_not_train() -> None:
    world = toy.world(("unlabelled",))
    assert world.task.unlabelled is not None
    images, before = world.task.unlabelled, digest(world.w)

    def targets(purpose: str) -> list[torch.Tensor]:
        lesson = lessons(world.task, images, [world.w], lambda z: z.mean(0), 3, 5, world.task.stream("distil", purpose))
        return [lesson(i)[1] for i in range(3)]

    first, again, other = targets("1"), targets("1"), targets("2")
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not all(a.equal(b) for a, b in zip(first, other, strict=True))
    assert [len(t) for t in first] == [5, 5, 2]  # twelve images: the last piece is kept
    assert digest(world.w) == before
    lesson = lessons(world.task, images, [world.w], lambda z: z.mean(0), 1, 5, world.task.stream("distil", "1"))
    x, target = lesson(0)
    assert torch.allclose(world.task.forward(world.w, x, train=False)[1], target, atol=1e-6)


def test_without_images_it_says_so() -> None:
    world = plain.world()
    with pytest.raises(UserError, match="federate.server.unlabelled: FedDF needs unlabelled images"):
        FedDF().server(world.task, Server(world.w), iter([Update(0, world.w, 1.0, {}, {})]))
