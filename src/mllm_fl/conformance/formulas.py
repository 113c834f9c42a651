"""What can be said of a formula without knowing it: smooth where a round begins, distilling in the direction that papers mean.

The added term is the objective minus FedAvg's on the same batch and weights. Of a stranger's term three things are checked:

* its gradient has no kink at the broadcast weights. A squared distance pulls twice as hard at twice the distance; an unsquared one
  pulls with all its strength at any, and jumps to the other side within a step;
* if the method needs the teacher and its gradient on the logits is that of a divergence between teacher and student, it is the
  one with the teacher first, KL(q || p): gradient ~ p_T - q_T at some temperature. KL(p || q) has ~ p (log p - log q - KL) instead;
* if the class declares ``adds = ("proximal", "mu")``, or "kl" or "distillation" with the fields of their strength and temperature,
  the term equals that formula, which is written here a second time, in NumPy.

What a method does on the server is not looked at here: write an oracle for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Task
from mllm_fl.conformance.play import play
from mllm_fl.conformance.row import Row
from mllm_fl.conformance.toy import World
from mllm_fl.seeds import numpy_stream, stream
from mllm_fl.trees import Tree, clone

Family = Callable[[float], Any]
"""A gradient on the logits, up to a factor, as a function of the temperature."""


class Place(NamedTuple):
    """A batch of one client's images in a later round, as ``objective`` gets it."""

    task: Task
    msg: Broadcast
    mine: Tree
    x: Tensor
    y: Tensor
    teacher: Tensor | None


def place(method: Algorithm, world: World, batch: list[int], client: int = 0) -> Place:
    """What the engine would hand to ``objective`` for this batch in the third round."""
    played = play(method, world)
    msg = method.broadcast(played.state)
    shard = world.shard(client, played.state.round + 1, method.needs)
    mine = method.begin(world.task, msg, played.memory.get(client, {}), shard)
    rows = {k: v[batch] if k.startswith("each/") else v for k, v in mine.items()}
    teacher = None if shard.teacher is None else shard.teacher[batch]
    return Place(world.task, msg, rows, shard.x(batch), shard.y[batch], teacher)


def at(place: Place, method: Algorithm, w: Tree) -> tuple[float, Tree]:
    """Value and gradient of a method's objective at the weights ``w``; a parameter it does not reach has gradient zero."""
    names = place.task.trainable
    mine = clone(w)
    leaves = [mine[k].requires_grad_(True) for k in names]
    loss = method.objective(place.task, mine, place.msg, place.mine, place.x, place.y)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = {k: torch.zeros_like(v) if g is None else g for k, v, g in zip(names, leaves, found, strict=True)}
    return float(loss.detach()), {k: v.detach() for k, v in grads.items()}


def added(place: Place, method: Algorithm, w: Tree) -> Tensor:
    """The gradient of what the method adds to cross-entropy, as one float64 vector."""
    ours, plain = at(place, method, w)[1], at(place, FedAvg(), w)[1]
    return torch.cat([(ours[k].double() - plain[k].double()).flatten() for k in place.task.trainable])


def smooth_at_the_start(row: Row) -> str | None:
    """The gradient is finite at the broadcast weights, and the added one is continuous there."""
    here = place(row.rich, row.world(), list(range(6)))
    grads = at(here, row.rich, here.msg.w)[1]
    for k, g in grads.items():
        if not bool(torch.isfinite(g).all()):
            return f"the gradient of {k} is not finite at the broadcast weights: the root of a sum of squares has no slope at 0"
    draws = stream(0, "direction")
    step = {
        k: torch.randn(here.msg.w[k].shape, generator=draws)
        * here.msg.w[k].float().square().mean().sqrt().clamp_min(0.1)
        for k in here.task.trainable
    }

    def jump(size: float) -> float:
        ahead, behind = (
            added(here, row.rich, {k: v + sign * size * step[k] if k in step else v for k, v in here.msg.w.items()})
            for sign in (1, -1)
        )
        return float((ahead - behind).norm())

    near, far = jump(1e-3), jump(1e-1)
    size = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    if near > 0.3 * far and near > 1e-4 * size:
        return (
            "the term it adds pulls as hard next to the broadcast weights as a hundred times further away: a norm that should"
            " be squared is not"
        )
    return None


def teacher_comes_first(row: Row) -> str | None:
    """A divergence between teacher and student is KL(teacher || student)."""
    if "teacher" not in row.method.needs:
        return None
    world = row.world(classes=5)
    forward: list[Family] = []
    backward: list[Family] = []
    measured = []
    for i in range(8):
        here = place(row.rich, world, [i], client=i % 2)
        assert here.teacher is not None
        w = clone(here.msg.w)
        w[here.task.head[1]] += torch.randn(5, generator=stream(0, "student", i)) * 1.5
        bias = here.task.head[1]
        measured.append((at(here, row.rich, w)[1][bias] - at(here, FedAvg(), w)[1][bias]).double().numpy())
        z, t = here.task.forward(clone(w), here.x)[1].detach().double().numpy()[0], here.teacher[0].double().numpy()
        forward.append(partial(_gradient, _forward, z, t))
        backward.append(partial(_gradient, _reverse, z, t))
    if max(float(np.abs(g).max()) for g in measured) < 1e-9:
        return None
    right, wrong = _misfit(measured, forward), _misfit(measured, backward)
    if wrong < 1e-3 < right:
        return (
            "the distillation runs in the wrong direction: its gradient is that of KL(student || teacher); the teacher is the"
            " first argument of the divergence, and the target of F.kl_div"
        )
    if _misfit([-g for g in measured], forward) < 1e-3:
        return "the distillation pushes the student away from the teacher: a sign is wrong"
    return None


def as_declared(row: Row) -> str | None:
    """The term that the class declares in ``adds`` is what its objective adds to cross-entropy."""
    declared: tuple[str, ...] | None = getattr(row.method, "adds", None)
    if declared is None:
        return None
    name, *parameters = declared
    if name not in REFERENCES:
        return f"adds names {name!r}; it may name {', '.join(REFERENCES)}"
    known = {f.name for f in fields(row.method)}
    if unknown := [p for p in parameters if p not in known]:
        return f"adds names the field {unknown[0]!r}, which the class does not have"
    here = place(row.rich, row.world(), list(range(6)))
    for w in _around(here):
        value = at(here, row.rich, w)[0] - at(here, FedAvg(), w)[0]
        expected = REFERENCES[name](here, w, *(float(getattr(row.rich, p)) for p in parameters))
        if abs(value - expected) > 1e-4 * max(1.0, abs(expected)):
            return (
                f"it declares to add {name}({', '.join(parameters)}) = {expected:.6g} to the loss, and adds {value:.6g}"
            )
    return None


def _around(here: Place) -> Iterator[Tree]:
    rng = numpy_stream(0, "around")
    for size in (0.0, 0.1, 0.5):
        yield {
            k: v + size * torch.from_numpy(rng.normal(size=tuple(v.shape))).float() if k in here.task.trainable else v
            for k, v in here.msg.w.items()
        }


def _proximal(here: Place, w: Tree, strength: float) -> float:
    """(strength / 2) sum over parameters of (w - w^t)^2."""
    return strength / 2 * sum(float(((w[k] - here.msg.w[k]).double().numpy() ** 2).sum()) for k in here.task.trainable)


def _kl(here: Place, w: Tree, strength: float, temperature: float = 1.0) -> float:
    """strength times the mean over the batch of sum_c q_c (log q_c - log p_c), both at the temperature."""
    assert here.teacher is not None
    z = here.task.forward(clone(w), here.x)[1].detach().double().numpy() / temperature
    p, q = _softmax(z), _softmax(here.teacher.double().numpy() / temperature)
    return strength * float((q * (np.log(q) - np.log(p))).sum(1).mean())


def _distillation(here: Place, w: Tree, strength: float, temperature: float) -> float:
    """T^2 times the same."""
    return temperature**2 * _kl(here, w, strength, temperature)


REFERENCES: dict[str, Callable[..., float]] = {"proximal": _proximal, "kl": _kl, "distillation": _distillation}


def _softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _gradient(of: Callable[[Any, Any], Any], z: Any, t: Any, temperature: float) -> Any:
    return of(_softmax(z / temperature), _softmax(t / temperature))


def _forward(p: Any, q: Any) -> Any:
    """p - q: the gradient of KL(q || p) with respect to p's logits, up to 1/T."""
    return p - q


def _reverse(p: Any, q: Any) -> Any:
    """p (log p - log q - KL(p || q)): the gradient of KL(p || q) with respect to p's logits, up to 1/T."""
    gap = np.log(p) - np.log(q)
    return p * (gap - (p * gap).sum())


def _misfit(measured: list[Any], family: list[Family]) -> float:
    """The share of the measured gradients that one temperature and one positive strength leave unexplained, at best."""
    g = np.concatenate(measured)

    def left(temperature: float) -> float:
        v = np.concatenate([f(temperature) for f in family])
        strength = max(float(g @ v) / max(float(v @ v), 1e-300), 0.0)
        return float(((g - strength * v) ** 2).sum() / (g**2).sum())

    grid = np.geomspace(0.2, 50, 90)
    best = float(grid[int(np.argmin([left(t) for t in grid]))])
    for width in (0.06, 0.005, 0.0005):
        grid = best * np.linspace(1 - width, 1 + width, 25)
        best = float(grid[int(np.argmin([left(t) for t in grid]))])
    return left(best)
