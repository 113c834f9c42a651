"""Our algorithms on Flower's simulation (Ray): ``name = "flower-sim"``, for those who have their machines under it. The same bits as the serial engine.

Each client is a node of Flower's, its ``partition-id`` is the client's number. Messages are those that travel between real machines (engines/wire.py); the task and the client's
images, which a real site has, come from engines/desk.py. What clients remember travels with the message, so that a run is resumed from the server's checkpoint like any other.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task, Update
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, client_failed, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.cores import workers_allowed
from mllm_fl.engines.desk import Desk, fetch
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.flower import Simulation, can_simulate
from mllm_fl.engines.link import Link
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.wire import Packed, Parcel, WireError, pack, unpack
from mllm_fl.engines.worker import Setup, do
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree

POLL = 0.02  # seconds between two looks for answers
TTL = 30 * 86400.0  # seconds: here nobody is late


class FlowerSimEngine:
    """See :class:`mllm_fl.engines.base.Engine`. ``workers`` processes of one thread each are started by Ray; test images stay here.

    Raises:
        UserError: Flower or Ray is not installed.
    """

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        algorithm: Algorithm,
        local: LocalConfig,
        batch_norm: str = "average",
        on_event: OnEvent = ignored,
    ) -> None:
        can_simulate()
        self.task, self.setup, self.on_event = task, Setup(task, algorithm, local, batch_norm), on_event
        self.workers = workers_allowed(config.workers)
        self._open, self._threads = contextlib.ExitStack(), 0
        self.desk: Desk
        self.link: Link
        self.nodes: dict[int, int] = {}  # client -> its node

    def __enter__(self) -> FlowerSimEngine:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with contextlib.ExitStack() as opened:
            self.desk = opened.enter_context(_sendable(lambda: Desk(self.setup)))
            handle = functools.partial(answer, self.desk.address)
            clients = len(self.task.population)
            self.link = opened.enter_context(Simulation(handle, clients, self.workers))
            self._greet(clients)
            self._open = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()
        torch.set_num_threads(self._threads)

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        def trees(shard: Shard) -> dict[str, Tree]:
            return {"w": msg.w, "extra": msg.extra, "mine": memory.get(shard.client, {})}

        for shard, found in self._ordered("train", shards, trees):
            w, extra, kept = (found.trees.get(name, {}) for name in ("w", "extra", "mine"))
            update = Update(shard.client, w, found.facts["weight"], extra, found.facts["metrics"])
            yield Reply(shard.client, update, kept, found.facts["seconds"])

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        return evaluate(self.task, w, images)

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        for shard, found in self._ordered("survey", shards, lambda shard: {"w": msg.w, "extra": msg.extra}):
            yield shard.client, found.trees.get("answer", {})

    def _greet(self, clients: int) -> None:
        """Which node plays which client: the server has no other way to know."""
        while len(there := list(self.link.nodes())) < clients:  # Flower still makes them
            time.sleep(POLL)
        waiting = dict.fromkeys(self._sent([(node, "hello", pack(Parcel())) for node in there]))
        while waiting:
            for said in self.link.collect(list(waiting)):
                del waiting[said.to]
                if said.packed is None:
                    raise UserError("flower-sim", f"a simulated node did not start ({said.problem})")
                facts = unpack(said.packed).facts
                self.nodes[int(facts["client"])] = int(facts["node"])
            time.sleep(POLL if waiting else 0)
        assert sorted(self.nodes) == list(range(clients))

    def _sent(self, letters: list[tuple[int, str, Packed]]) -> list[str]:
        ids = [i for i in self.link.send(letters, "", TTL) if i is not None]
        if len(ids) != len(letters):
            raise UserError("flower-sim", "Flower did not take a message", "the same command resumes")
        return ids

    def _ordered(
        self, kind: str, shards: Sequence[Shard], trees: Callable[[Shard], dict[str, Tree]]
    ) -> Iterator[tuple[Shard, Parcel]]:
        """Answers in the order of ``shards``; a few messages for each worker are under way, so that they lie not all in memory."""
        ahead, sent = 4 * self.workers, 0
        waiting: dict[str, tuple[Shard, int]] = {}
        done: dict[int, Parcel] = {}
        try:
            for shard in shards:
                while shard.client not in done:
                    while sent < len(shards) and len(waiting) + len(done) < ahead:
                        waiting |= self._send(kind, shards[sent], trees(shards[sent]))
                        sent += 1
                    for said in self.link.collect(list(waiting)):
                        mine, ticket = waiting.pop(said.to)
                        self.desk.clear(ticket)
                        done[mine.client] = self._opened(mine, said.packed, said.problem)
                    time.sleep(0 if shard.client in done else POLL)
                yield shard, done.pop(shard.client)
        finally:
            for _, ticket in waiting.values():
                self.desk.clear(ticket)

    def _send(self, kind: str, shard: Shard, trees: dict[str, Tree]) -> dict[str, tuple[Shard, int]]:
        ticket = self.desk.put(shard)
        try:
            packed = pack(Parcel({"client": shard.client, "ticket": ticket}, trees))
        except WireError as e:
            raise UserError(_who(shard), str(e), 'set federate.engine.name = "parallel"') from e
        [number] = self._sent([(self.nodes[shard.client], kind, packed)])
        return {number: (shard, ticket)}

    def _opened(self, shard: Shard, packed: Packed | None, problem: str) -> Parcel:
        """An answer, or the one line for what went wrong at the client."""
        if packed is None:
            way_out = "the same command resumes; give it more memory or fewer workers (federate.engine.workers)"
            raise UserError(_who(shard), f"Flower says: {problem}", way_out)
        found = unpack(packed)
        if "refused" in found.facts:
            place, _, rest = found.facts["refused"].partition(": ")
            raise UserError(place, rest)
        if "failed" in found.facts:
            fields = {"client": shard.client, "round": shard.round}
            raise client_failed(_who(shard), found.facts["failed"], found.facts["traceback"], fields, self.on_event)
        return found


def answer(desk: str, kind: str, packed: Packed, node_config: Mapping[str, Any], node: int) -> Packed:
    """A simulated node's answer, in a process that Ray started. Never raises."""
    client, start = int(node_config["partition-id"]), time.perf_counter()
    if kind == "hello":
        return pack(Parcel({"client": client, "node": str(node)}))
    try:
        torch.set_num_threads(1)
        parcel = unpack(packed)
        assert parcel.facts["client"] == client
        setup, shard = fetch(desk, parcel.facts["ticket"])
        msg = Broadcast(parcel.trees.get("w", {}), parcel.trees.get("extra", {}))
        args = (shard, parcel.trees.get("mine", {})) if kind == "train" else (shard,)
        found = do({"setup": setup, "broadcast": msg}, kind, args)
        if kind == "survey":
            return pack(Parcel({}, {"answer": found}))
        update, kept = found
        metrics = {k: float(v) for k, v in update.metrics.items()}
        facts = {"weight": float(update.weight), "metrics": metrics, "seconds": time.perf_counter() - start}
        return pack(Parcel(facts, {"w": update.w, "extra": update.extra, "mine": kept}))
    except UserError as e:
        return pack(Parcel({"refused": str(e)}))
    except Exception as e:
        return pack(Parcel({"failed": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}))


def _who(shard: Shard) -> str:
    return f"client {shard.client}, round {shard.round}"


def _sendable(made: Callable[[], Desk]) -> Desk:
    try:
        return made()
    except UserError:
        raise
    except Exception as e:  # a class inside a function, a lambda
        problem = f"the method or the task cannot be sent to another process ({type(e).__name__}: {e})"
        way_out = 'define it in a module of its own, or set federate.engine.name = "serial"'
        raise UserError("federate.engine", problem, way_out) from e
