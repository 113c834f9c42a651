"""A federation played by hand: the round loop without run folder, with everything that can go wrong on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mllm_fl.algorithms.base import Algorithm, Broadcast, Server, Task, Update
from mllm_fl.algorithms.refusal import why_answer_refused, why_refused
from mllm_fl.conformance.toy import World
from mllm_fl.engines.checkpoint import load_checkpoint, save_checkpoint
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.trees import Tree, prefixed, under

LOCAL = LocalConfig(epochs=2, batch_size=8, lr=0.05, augment="crop")
Post = Callable[[int, Update], Update]


@dataclass
class Played:
    """What a play left behind; ``deployed`` are the weights that would be evaluated."""

    task: Task
    state: Server
    memory: dict[int, Tree]
    deployed: Tree
    sent: list[Broadcast] = field(default_factory=list)
    updates: list[list[Update]] = field(default_factory=list)
    answers: dict[int, Tree] = field(default_factory=dict)


def play(
    method: Algorithm,
    world: World,
    rounds: int = 2,
    *,
    arrival: Sequence[int] | None = None,
    absent: Collection[tuple[int, int]] = (),
    lost: Collection[tuple[int, int]] = (),
    post: Post | None = None,
    batch_norm: str = "average",
    local: LocalConfig = LOCAL,
    interrupt: bool = False,
    start: Server | None = None,
) -> Played:
    """A few rounds with all clients.

    Args:
        arrival: the order in which clients are trained; the server receives them in client order all the same.
        absent: (round, client) not online: not trained.
        lost: (round, client) trained, but the answer never arrives.
        post: what happens to an update of a round on its way to the server; invalid ones are dropped, as the stage drops them.
        interrupt: after every round all state goes to a checkpoint file and comes back from it.
        start: the state to continue from, instead of ``init``'s.
    """
    task = world.task
    state = start or method.init(task, world.w)
    memory: dict[int, Tree] = {}
    seen = Played(task, state, memory, {})
    order = list(arrival if arrival is not None else range(len(world.clients)))
    for t in range(state.round + 1, state.round + rounds + 1):
        msg = method.broadcast(state)
        replies: dict[int, tuple[Update, Tree]] = {}
        for k in order:
            if (t, k) in absent or not len(world.clients[k]):
                continue
            shard = world.shard(k, t, method.needs)
            replies[k] = train_client(task, method, msg, memory.get(k, {}), shard, local, batch_norm)
        accepted: list[Update] = []
        for k in sorted(replies):
            update = post(t, replies[k][0]) if post else replies[k][0]
            if (t, k) in lost or why_refused(method, task, update, msg.w):
                continue
            accepted.append(update)
            memory[k] = replies[k][1]
        seen.sent.append(msg)
        seen.updates.append(accepted)
        if accepted:
            state = method.server(task, state, once(accepted))
        state = replace(state, round=t)
        if interrupt:
            state, memory = through_a_file(state, memory)
    if method.concludes:
        state, seen.answers = concluded(method, world, state)
    seen.state, seen.memory, seen.deployed = state, memory, method.deploy(task, state)
    return seen


def concluded(method: Algorithm, world: World, state: Server) -> tuple[Server, dict[int, Tree]]:
    """The state after the survey of all clients that hold an image, and their answers."""
    msg = method.broadcast(state)
    answers = {
        k: method.survey(world.task, msg, world.shard(k, state.round + 1, method.needs))
        for k in range(len(world.clients))
        if len(world.clients[k])
    }
    good = [k for k in sorted(answers) if not why_answer_refused(method, world.task, answers[k])]
    return method.conclude(world.task, state, ((k, answers[k]) for k in good)), answers


def once(updates: Sequence[Update]) -> Iterator[Update]:
    """The updates as an engine hands them over: an iterator that can be read once."""
    yield from updates


def through_a_file(state: Server, memory: Mapping[int, Tree]) -> tuple[Server, dict[int, Tree]]:
    """Server state and client memories, written to a checkpoint and read back."""
    tensors = prefixed(state.w, "w/") | prefixed(state.extra, "extra/")
    for k, mine in memory.items():
        tensors |= prefixed(mine, f"memory/{k}/")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_checkpoint(path, tensors, {"round": state.round, "remembering": json.dumps(sorted(memory))})
        read, record = load_checkpoint(path)
    back = {int(k): under(read, f"memory/{k}/") for k in json.loads(record["remembering"])}
    return Server(under(read, "w/"), under(read, "extra/"), int(record["round"])), back
