"""What holds whatever a method does: it starts from FedAvg, it is fair to clients, and odd clients do not break it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable

import torch

from mllm_fl.algorithms.base import Algorithm, FedAvg, Update
from mllm_fl.conformance.play import LOCAL, Played, once, play
from mllm_fl.conformance.row import Row
from mllm_fl.conformance.spy import ARGUMENTS
from mllm_fl.conformance.toy import World
from mllm_fl.engines.local import train_client
from mllm_fl.trees import Tree, digest, why_invalid

Check = Callable[[Row], str | None]
NEEDS = ("unlabelled", "labelled", "teacher", "texts")


def says_what_it_is(row: Row) -> str | None:
    """Declarations are complete: docstring, neutral values that are fields, needs that exist, hooks with the contract's arguments."""
    cls = row.method
    if not (cls.__doc__ or "").strip() and not (sys.modules[cls.__module__].__doc__ or "").strip():
        return "neither the class nor its module has a docstring; say title, authors, year and the update rule"
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "the class is not frozen; decorate it with @dataclass(frozen=True), hyper-parameters are its fields"
    for hook, names in ARGUMENTS.items():
        own = tuple(inspect.signature(getattr(cls, hook)).parameters)[1:]
        if own != names:
            return f"{hook} takes ({', '.join(own)}) where the contract hands it ({', '.join(names)})"
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(cls.neutral) - fields):
        return (
            f"neutral names {unknown[0]!r}, which is not a field; its fields are {', '.join(sorted(fields)) or 'none'}"
        )
    if not cls.neutral and not same(row, row.rich, FedAvg()):
        return "declares no neutral value: say under which field values the method is FedAvg"
    if strange := sorted(set(cls.needs) - set(NEEDS)):
        return f"needs {strange[0]!r}, which nobody provides; it may be any of {', '.join(NEEDS)}"
    return None


def neutral_is_fedavg(row: Row) -> str | None:
    """At its neutral value the method is FedAvg bit for bit, in what it deploys, what it broadcasts and the losses it records."""
    world = row.world()
    a, b = play(row.plain, world), play(FedAvg(), world)
    if digest(a.deployed) == digest(b.deployed) and digest(a.state.w) == digest(b.state.w):
        losses = [[u.metrics.get("loss") for sent in p.updates for u in sent] for p in (a, b)]
        if losses[0] == losses[1]:
            return None
        return (
            f"at {dict(row.method.neutral)} its weights are FedAvg's, and the losses that it records differ in their last"
            " digits: the same sum in another order; return FedAvg's own objective there"
        )
    name = _first_difference(a.deployed, b.deployed) or _first_difference(a.state.w, b.state.w)
    gap = max(distance(a.deployed, b.deployed), distance(a.state.w, b.state.w))
    cause = (
        "the sums are FedAvg's in another order; return FedAvg's own result when the value is neutral"
        if gap < 1e-5
        else "a term does not vanish there, or the neutral values leave out a field"
    )
    return f"at {dict(row.method.neutral)} it is not FedAvg: {name} differs by {gap:.2g} of FedAvg's move; {cause}"


def differs_from_fedavg(row: Row) -> str | None:
    """At the row's values the method is not FedAvg, by more than rounding."""
    world = row.world()
    plain = play(FedAvg(), world, rounds=3)
    if row.method is FedAvg:
        return None if distance(plain.deployed, world.w) > 0 else "FedAvg does not learn"
    gap = distance(play(row.rich, world, rounds=3).deployed, plain.deployed)
    if gap > 1e-6:
        return None
    values = ", ".join(f"{k}={v}" for k, v in row.fields.items()) or "its defaults"
    how = "bit for bit FedAvg" if gap == 0 else f"FedAvg up to rounding ({gap:.1g})"
    return (
        f"with {values} three rounds are {how}: its term never acts, for example because state (a momentum, a memory) is"
        " computed and not returned, or a difference is taken between a tensor and itself"
    )


def order_of_arrival(row: Row) -> str | None:
    """Which client answers first, and in which order updates are summed, changes nothing (the latter up to rounding)."""
    world = row.world()
    first, second = play(row.rich, world, arrival=[0, 1, 2]), play(row.rich, world, arrival=[2, 0, 1])
    if digest(first.deployed) != digest(second.deployed):
        return (
            "training clients in another order gives other weights: a hook keeps something from one client to the next"
        )
    task, method, state = world.task, row.rich, row.rich.init(world.task, world.w)
    updates = _one_round(row, world)
    moved = [method.server(task, state, once(order)).w for order in (updates, updates[::-1])]
    if distance(moved[0], moved[1], world.w) > 1e-2:
        return "updates in another order give another model: the server treats the first or the last client differently"
    return None


def identical_clients(row: Row) -> str | None:
    """Two clients that send the same update are one client: the aggregate does not depend on how often it was sent."""
    world = row.world()
    method, task, state = row.rich, world.task, row.rich.init(world.task, world.w)
    one = _one_round(row, world)[0]
    a = method.server(task, state, once([one]))
    b = method.server(task, state, once([one, one._replace(client=1)]))
    gap = distance(a.w, b.w, world.w)
    if gap > 1e-4:
        return f"the same update sent twice moves the model differently (by {gap:.2g} of the move): weights are not normalised"
    return None


def one_client(row: Row) -> str | None:
    """A federation of one client."""
    return sound(row, play(row.rich, row.world(sizes=(9,))), "with a single client")


def odd_clients(row: Row) -> str | None:
    """Clients with one class, with one image, and with none this round."""
    world = row.world()
    base = world.clients[0]
    one_class = base.subset([i for i, y in enumerate(base.labels) if y == base.labels[0]])
    for what, clients in (
        ("with a client that has one class", [base, one_class]),
        ("with a client that has one image", [base, base.subset([0])]),
        ("with nothing but a client that has one image", [base.subset([0])]),
        ("with a client that has no image", [base, base.subset([])]),
    ):
        if said := sound(row, play(row.rich, world.holding(clients)), what):
            return said
    return None


def vanishing_client(row: Row) -> str | None:
    """A client trains and its answer never arrives; another is absent and comes back; one comes for the first time late."""
    absent, lost = {(1, 2), (2, 1)}, {(2, 0), (3, 1)}
    played = play(row.rich, row.world(), rounds=4, absent=absent, lost=lost)
    return sound(row, played, "when clients vanish in the middle of a round and come back")


def rejected_update(row: Row) -> str | None:
    """An update with a NaN is dropped, and the round is the one that would have been without it."""
    world = row.world()

    def poison(t: int, u: Update) -> Update:
        bad = (t, u.client) == (1, 1)
        return u._replace(w={k: v * float("nan") if v.is_floating_point() else v for k, v in u.w.items()}) if bad else u

    a = play(row.rich, world, rounds=3, post=poison)
    if said := sound(row, a, "after an update with NaN was dropped"):
        return said
    if digest(a.deployed) != digest(play(row.rich, world, rounds=3, lost={(1, 1)}).deployed):
        return "a dropped update still changes the model: something of it is kept outside the server's state"
    return None


def unreached_parameters(row: Row) -> str | None:
    """A parameter that no loss reaches has no gradient: it is absent from ``grads``, and the method lets it be."""
    world = row.world(idle=True)
    played = play(row.rich, world)
    if said := sound(row, played, "when a parameter has no gradient"):
        return said
    if float((played.state.w["idle"] - world.w["idle"]).abs().max()) > 1e-3:
        return "a parameter that no loss reaches moves all the same; leave out the names that are not in grads"
    return None


def net_is_structure(row: Row) -> str | None:
    """All weights come in as trees: the network object's own are never used (here they are NaN)."""
    world = row.world()
    hollow = copy.deepcopy(world.task.net)
    with torch.no_grad():
        for v in hollow.state_dict().values():
            v.fill_(float("nan") if v.is_floating_point() else -1)
    empty = dataclasses.replace(world, task=dataclasses.replace(world.task, net=hollow))
    if digest(play(row.rich, world).deployed) != digest(play(row.rich, empty).deployed):
        return (
            "the network object's own weights or buffers enter the result: call task.forward(w, x) with a whole tree, buffers"
            " included, never task.net(x)"
        )
    return None


def shapes_are_kept(row: Row) -> str | None:
    """What is broadcast, sent and deployed has the names, shapes and dtypes of the network's weights."""
    world = row.world()
    played = play(row.rich, world)
    for what, w in (
        ("broadcasts", played.sent[-1].w),
        ("keeps", played.state.w),
        ("deploys", played.deployed),
        *((f"sends (client {u.client})", u.w) for u in played.updates[-1]),
    ):
        if said := why_invalid(w, world.w):
            return f"it {what} weights that do not fit the network: {said}"
    return None


def same(row: Row, a: Algorithm, b: Algorithm) -> bool:
    """Whether two methods deploy the same bits on the row's world."""
    world = row.world()
    return digest(play(a, world).deployed) == digest(play(b, world).deployed)


def _one_round(row: Row, world: World) -> list[Update]:
    """The updates of a first round, in client order."""
    method, task = row.rich, world.task
    msg = method.broadcast(method.init(task, world.w))
    return [
        train_client(task, method, msg, {}, world.shard(k, 1, method.needs), LOCAL)[0]
        for k in range(len(world.clients))
    ]


def sound(row: Row, played: Played, when: str) -> str | None:
    """Whether weights and server state are finite, and which leaf is not."""
    for where, tree in (
        ("weights", played.deployed),
        ("weights", played.state.w),
        ("server state", played.state.extra),
    ):
        for k, v in tree.items():
            if not bool(torch.isfinite(v).all()):
                return (
                    f"{when}, {k} of the {where} is not finite: divide by nothing that can be zero (a count, a norm, a"
                    " variance of one image)"
                )
    return None


def distance(a: Tree, b: Tree, start: Tree | None = None) -> float:
    """||a - b|| over float leaves, as a share of ||b - start|| (else of ||b||)."""
    names = [k for k in b if b[k].is_floating_point()]
    top = sum(float((a[k].double() - b[k].double()).square().sum()) for k in names) ** 0.5
    ground = {k: b[k].double() - (start[k].double() if start else 0) for k in names}
    below = sum(float(v.square().sum()) for v in ground.values()) ** 0.5
    return float(top / max(below, 1e-12))


def _first_difference(a: Tree, b: Tree) -> str:
    return next((k for k in b if k not in a or not torch.equal(a[k], b[k])), "")
