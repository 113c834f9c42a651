"""What must outlive a hook, and what must not: state through checkpoint files, purity, BatchNorm's buffers, random streams."""

from __future__ import annotations

from dataclasses import replace

import torch

from mllm_fl.algorithms.base import Algorithm, FedAvg, Update
from mllm_fl.conformance import generators
from mllm_fl.conformance.play import once, play
from mllm_fl.conformance.row import Row
from mllm_fl.conformance.spy import HOOKS, Log, spied
from mllm_fl.trees import Tree, digest


def interruption(row: Row) -> str | None:
    """A run whose state goes through a checkpoint file after every round ends with the bits of one that was not interrupted."""
    world = row.world()
    whole, cut = play(row.rich, world, rounds=3), play(row.rich, world, rounds=3, interrupt=True)
    if digest(whole.deployed) == digest(cut.deployed) and digest(whole.state.extra) == digest(cut.state.extra):
        return None
    return (
        "a run that is saved and loaded between rounds ends with other weights: something lives outside Server.extra and the"
        " client's memory, or is not a tensor there"
    )


def memory_is_returned(row: Row) -> str | None:
    """What a client looks for in its memory, ``finish`` has returned; what it remembers from the first visit on, it updates."""
    log, world = Log(), row.world()
    method = spied(row.rich, log)
    played = play(method, world, rounds=3)
    for found in log.forgotten:
        if "memory" in found:
            return f"at a second visit {found}, where nobody put it: finish must return it as its second value"
    k = 0
    shard, msg = world.shard(k, 4, row.method.needs), row.rich.broadcast(played.state)
    fresh = row.rich.begin(world.task, msg, {}, shard)
    for name, v in fresh.items():
        if name.startswith("each/") or not v.is_floating_point():
            continue
        other = row.rich.begin(world.task, msg, {**fresh, name: v + 1}, shard)
        if name not in other or not torch.equal(other[name], v + 1):
            continue  # made anew at each visit: not a memory
        kept = played.memory.get(k, {})
        if name not in kept:
            return (
                f"begin takes {name!r} from the client's memory, and finish does not return it: it is new at each visit"
            )
        if not bool(v.any()) and not bool(kept[name].any()):
            return f"the client's memory {name!r} is still zero after three visits: finish computes it and does not return it"
    return None


def server_state_is_kept(row: Row) -> str | None:
    """What the server looks for in its state is there, in the form that ``init`` gave it; what starts at zero moves."""
    log, world = Log(), row.world()
    played = play(spied(row.rich, log), world, rounds=3)
    for found in log.forgotten:
        if "state" in found:
            return f"after the first round {found}, where nobody put it: server must return it in Server.extra"
    start = row.rich.init(world.task, world.w).extra
    for name, v in start.items():
        if name not in played.state.extra:
            return f"the server's state {name!r} is gone after three rounds: server must return it in Server.extra"
        now = played.state.extra[name]
        if (now.shape, now.dtype) != (v.shape, v.dtype):
            return (
                f"the server's state {name!r} is {now.dtype} {tuple(now.shape)} after three rounds, init made it {v.dtype}"
                f" {tuple(v.shape)}: no checkpoint could be checked; give every leaf its form in init"
            )
        if not bool(v.any()) and not bool(played.state.extra[name].any()):
            return f"the server's state {name!r} is still zero after three rounds: it is computed and not returned"
    if new := sorted(played.state.extra.keys() - start.keys()):
        return f"the server's state {new[0]!r} appears after init: no checkpoint could be checked; init must make every leaf"
    return None


def observed(row: Row) -> Log:
    """Two rounds under observation; the engine's own refusal of what was found does not end it without a finding."""
    log = Log()
    try:
        play(spied(row.rich, log), row.world(), rounds=2)
    except Exception:
        if not (log.changed or log.stored):
            raise
    return log


def arguments_unchanged(row: Row) -> str | None:
    """No hook changes what it is handed: broadcast, memory, state, updates, gradients, weights (but BatchNorm's buffers in a pass)."""
    log = observed(row)
    if not log.changed:
        return None
    return f"{log.changed[0]}: an operation in place (add_, -=, copy_, update, a key written); work on a copy"


def nothing_on_self(row: Row) -> str | None:
    """The object and its class are the same after a play as before."""
    log = observed(row)
    if not log.stored:
        return None
    return f"{log.stored[0]}: other clients and other processes have other objects; it belongs to Server.extra or to the memory"


def no_global_state(row: Row) -> str | None:
    """The same play twice, with another federation in between, gives the same bits."""
    first = play(row.rich, row.world())
    play(row.rich, row.world(seed=1, sizes=(8, 8)))
    if digest(first.deployed) != digest(play(row.rich, row.world()).deployed):
        return "the second of two equal runs in one process differs: something is kept in a module, a class or a cache"
    return None


def no_global_random(row: Row) -> str | None:
    """No global generator is drawn from or seeded; no result depends on one."""
    before = generators.snapshot()
    try:
        first = play(row.rich, row.world())
        if found := generators.used(before, generators.snapshot()):
            return (
                f"the global generator of {found[0]} is used: results then depend on whatever else draws; hand the draw a"
                " generator from shard.stream(purpose) or task.stream(purpose, ...)"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            if digest(play(row.rich, row.world()).deployed) != digest(first.deployed):
                return "the result depends on the state of torch's global generator; draw from a named stream"
    finally:
        generators.put_back(before)
    return None


def buffers_are_averaged(row: Row) -> str | None:
    """BatchNorm's running statistics of the clients reach the next global model; its counter is an integer and stays one."""
    world = row.world()
    method, task = row.rich, world.task
    played = play(method, world, rounds=1)
    state, updates = method.init(task, world.w), played.updates[0]
    buffers = [k for k in world.w if k not in task.trainable]
    floats = [k for k in buffers if world.w[k].is_floating_point()]

    def shifted(u: Update, by: float) -> Update:
        return u._replace(w={k: v + by if k in floats else v for k, v in u.w.items()})

    moved = method.server(task, state, once([shifted(u, 1.0 + u.client) for u in updates])).w
    for k in buffers:
        if moved[k].dtype != world.w[k].dtype:
            return f"{k} becomes {moved[k].dtype}: an integer counter was averaged as a float and not rounded back"
    clients = [shifted(u, 1.0 + u.client).w for u in updates]
    for k in floats:
        if torch.equal(moved[k], state.w[k]):
            return f"{k} stays at the old global value: the server averages parameters and leaves out the buffers"
        low, high = (
            torch.stack([w[k] for w in clients]).aminmax(dim=0).min,
            torch.stack([w[k] for w in clients]).amax(0),
        )
        inside = bool(((moved[k] >= low - 1e-4) & (moved[k] <= high + 1e-4)).all())
        if not inside and not {"unlabelled", "labelled"} & set(row.method.needs):
            return (
                f"{k} lies outside what any client sent: buffers are averaged with the clients' weights, nothing else"
            )
    return None


def batch_norm_policies(row: Row) -> str | None:
    """Under each of the three policies the method runs, is FedAvg at its neutral value, and its memory keeps the buffers' names apart."""
    for policy in ("average", "local", "reset"):
        plain = play(row.plain, row.world(), batch_norm=policy)
        if digest(plain.state.w) != digest(play(FedAvg(), row.world(), batch_norm=policy).state.w):
            return (
                f"with model.batch_norm = {policy!r} its neutral value is not FedAvg: it treats buffers in its own way"
            )
        played = play(row.rich, row.world(), batch_norm=policy)
        for k, v in _all(played.state.w, *played.memory.values()):
            if not bool(torch.isfinite(v).all()):
                return f"with model.batch_norm = {policy!r}, {k} is not finite"
            if k.endswith("num_batches_tracked") and v.is_floating_point():
                return f"with model.batch_norm = {policy!r}, {k} is {v.dtype} instead of an integer"
        if policy == "local" and not all(any(k.startswith("batch_norm/") for k in m) for m in played.memory.values()):
            return "with model.batch_norm = 'local', the client's own statistics are not in its memory"
    return None


def _all(*trees: Tree) -> list[tuple[str, torch.Tensor]]:
    return [item for tree in trees for item in tree.items()]


def post_hoc(row: Row) -> str | None:
    """A method that leaves the rounds to FedAvg gives, applied to a finished FedAvg run, what it gives in its own."""
    cls = row.method
    own = {h for h in ("broadcast", "begin", "objective", "correct", "finish", "server") if h in _overridden(cls)}
    if own or not ({"survey", "conclude", "deploy"} & _overridden(cls)):
        return None
    world = row.world()
    mine, finished = play(row.rich, world), play(FedAvg(), world)
    state = replace(row.rich.init(world.task, finished.state.w), round=finished.state.round)
    if digest(play(row.rich, world, rounds=0, start=state).deployed) != digest(mine.deployed):
        return (
            "on a finished FedAvg run it gives another model than in a run of its own: conclude depends on the rounds"
        )
    return None


def _overridden(cls: type) -> set[str]:
    return {h for h in HOOKS if getattr(cls, h) is not getattr(Algorithm, h)}
