"""SCAFFOLD (arXiv:1910.06378, Algorithm 1, option II) in NumPy, with a client that is away for a round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import plain

from mllm_fl.algorithms.base import Broadcast, Local, Server, Update
from mllm_fl.algorithms.scaffold import Scaffold
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.errors import UserError


@pytest.mark.parametrize("control", [1.0, 0.4])
def test_three_rounds_in_numpy(control: float) -> None:
    world = plain.world()
    w, data = plain.of(world.w), [plain.seen(c) for c in world.clients]
    zero = {k: 0 * v for k, v in w.items()}
    c, mine = zero, [zero] * 3
    for t in (1, 2, 3):
        online = [k for k in range(3) if (t, k) != (2, 0)]
        local, change = [], []
        for k in online:
            m, y = data[k]
            v = w
            for _ in range(plain.STEPS):
                g = plain.slope(plain.on(plain.ce, m, y), v)
                v = {n: v[n] - plain.LR * (g[n] + control * (c[n] - mine[k][n])) for n in v}
            new = {n: control * (mine[k][n] - c[n]) + (w[n] - v[n]) / (plain.STEPS * plain.LR) for n in v}
            change.append({n: new[n] - mine[k][n] for n in v})
            local.append(v)
            mine[k] = new
        w = plain.mean([(16, 11, 7)[k] for k in online], local)
        share = len(online) / 3
        c = {n: c[n] + share * sum(d[n] for d in change) / len(online) for n in c}
    played = play(Scaffold(control=control), world, 3, local=plain.LOCAL, absent={(2, 0)})
    plain.near(played.state.w, w)
    plain.near(played.state.extra, c)
    plain.near(played.memory[0], mine[0])


@pytest.mark.parametrize("control", [1.0, 0.4])
def test_the_variate_is_the_clients_mean_gradient(control: float) -> None:
    """Whatever the strength: what a client remembers is the mean of the gradients of its own loss along its steps."""
    world = plain.world()
    played = play(Scaffold(control=control), world, 2, local=plain.LOCAL)
    again = play(Scaffold(control=control), world, 1, local=plain.LOCAL)
    m, y = plain.seen(world.clients[0])
    v, c, mine = plain.of(again.state.w), plain.of(again.state.extra), plain.of(again.memory[0])
    total = {n: 0 * g for n, g in v.items()}
    for _ in range(plain.STEPS):
        g = plain.slope(plain.on(plain.ce, m, y), v)
        total = {n: total[n] + g[n] / plain.STEPS for n in v}
        v = {n: v[n] - plain.LR * (g[n] - control * (mine[n] - c[n])) for n in v}
    plain.near(played.memory[0], total, 1e-4)


def test_the_servers_variate_is_summed_in_float64() -> None:
    world, method = toy.world(), Scaffold()
    state = method.init(world.task, world.w)
    sent = [plain.moved(state.extra, [0.1 * k])[0] for k in (1, 2, 7)]
    updates = [Update(k, world.w, 2.0, extra, {}) for k, extra in enumerate(sent)]
    got = method.server(world.task, Server(world.w, sent[1]), iter(updates)).extra
    for k, v in got.items():
        total = sum(e[k].double().numpy() for e in sent)
        expected = sent[1][k].double().numpy() + total / 3
        assert np.array_equal(v.numpy(), expected.astype(np.float32)), k


def test_the_form_is_the_parameters() -> None:
    """Names, shapes and dtypes, of a network in float64 too."""
    world = plain.world()
    task = replace(world.task, net=plain.Linear(3).double())
    form = Scaffold().upload_form(task)[""]
    assert {k: (tuple(v.shape), v.dtype) for k, v in form.items()} == {
        "scale": ((3,), torch.float64),
        "classifier.weight": ((3, 3), torch.float64),
        "classifier.bias": ((3,), torch.float64),
    }


def test_local_momentum_is_refused() -> None:
    world = plain.world()
    local = Local(0, world.w, 3, 0.5, world.shard(0, 1), 0.1, 0.9)
    msg = Broadcast(world.w, {k: torch.zeros_like(v) for k, v in world.w.items()})
    with pytest.raises(UserError, match=r"federate.local.momentum: .*plain SGD"):
        Scaffold().finish(world.task, local, msg, {})
