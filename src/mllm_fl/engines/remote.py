"""The engine whose clients are on other machines: one message a node and round, a deadline, and a record of who was dropped and why.

A round goes to the nodes that are there, once each, with everything that their clients need; what they remember between rounds stays with them, and the server keeps only which
round's memory is the valid one (so that a rejected update, or a server that was killed before its checkpoint, leaves no trace in it). Answers that do not come in time are
dropped and the mean is over the others: the weights are renormalised by the mean itself. With less than ``minimum`` answers the round is played again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from mllm_fl.algorithms.base import Broadcast, Shard, Task, Update
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, ignored
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.link import Answer, Link
from mllm_fl.engines.reception import Reception
from mllm_fl.engines.wire import Packed, Parcel, WireError, pack, payload, unpack, with_facts
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree, nbytes

POINTER = "remembered in round"  # the server's whole memory of a client: the node holds the rest
GRACE = 2.0  # seconds after the deadline in which the SuperLink says which messages have run out
LOOK = 2.0  # seconds between two looks at which nodes were started again
ROOM = 16 << 20  # bytes that an answer may have beyond four times what was sent


@dataclass(frozen=True)
class Schedule:
    """When a round is over. Seconds throughout.

    ``deadline``: after which a client that has not answered is dropped. ``minimum``: answers without which a round is played again, at most
    ``attempts`` times. ``wait``: for sites that are not there. ``poll``: between two looks for answers.
    """

    deadline: float = 600.0
    minimum: int = 1
    attempts: int = 3
    wait: float = 600.0
    poll: float = 0.3

    def __post_init__(self) -> None:
        for name in ("deadline", "minimum", "attempts", "wait", "poll"):
            if not getattr(self, name) > 0:
                raise UserError(name, f"{getattr(self, name)} is not above 0")


class RemoteEngine:
    """See :class:`mllm_fl.engines.base.Engine`.

    Args:
        task: what is learned; None for an engine that only greets.
        common: facts that every message carries: the configuration, and what a node needs to make its task.
        checkpoint_every: rounds between the server's checkpoints; nodes keep what they remembered since the last one.
        on_state: told what is going on, for ``mllm-fl deploy status``.
    """

    def __init__(
        self,
        link: Link,
        reception: Reception,
        task: Task | None,
        common: Mapping[str, Any],
        schedule: Schedule | None = None,
        checkpoint_every: int = 1,
        on_event: OnEvent = ignored,
        on_state: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> None:
        self.link, self.reception, self.task, self.common = link, reception, task, dict(common)
        self.schedule, self.every = schedule or Schedule(), checkpoint_every
        self.on_event, self.on_state = on_event, on_state
        self.dropped: dict[int, str] = {}
        self.owing: dict[int, str] = {}  # node -> the message that it has not answered
        self._refused_when: dict[int, str] = {}
        self._threads = 0

    def __enter__(self) -> RemoteEngine:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        torch.set_num_threads(self._threads)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        assert self.task is not None
        return evaluate(self.task, w, images)

    def gather(self) -> None:
        """Greet sites until all have been heard.

        Raises:
            UserError: after ``wait`` seconds some site has not been admitted; names it and why.
        """
        until = time.monotonic() + self.schedule.wait
        while True:
            self.greet()
            missing = [s.name for s in self.reception.sites if s.name not in self.reception.admitted.values()]
            if not missing:
                return
            self.on_state({"waiting_for": missing, "refused": self._refusals()})
            if time.monotonic() > until:
                why = next(iter(self._refusals().values()), "it has not been heard")
                raise UserError(
                    f"site {missing[0]}",
                    f"not admitted within {self.schedule.wait:g} s ({why})",
                    "mend or start it (`mllm-fl deploy doctor` there), and resume the run",
                )
            time.sleep(self.schedule.poll)

    def greet(self) -> None:
        """Say hello to nodes that have not been heard; whoever may not take part is recorded once."""
        here = self.link.nodes()
        for n, since in self._refused_when.items():
            if here.get(n, since) != since:  # mended and started again
                self.reception.refused.pop(n, None)
        unknown = [n for n in here if n not in self.reception.admitted and n not in self.reception.refused]
        unknown = [n for n in unknown if n not in self.owing]
        if not unknown:
            return
        facts = self.common | {"classes": list(self.reception.class_names), "images": self.reception.images}
        for node, parcel, problem in self._exchange(
            "hello", {n: facts | {"client": self.reception.client(n)} for n in unknown}, _packed({}), 0
        ):
            if parcel is None:
                self.on_event("no greeting", node=str(node), site=self.reception.site(node), reason=problem)
                continue
            why = self.reception.admit(node, parcel.facts)
            if why:
                self._refused_when[node] = here[node]
            kind = "site refused" if why else "site admitted"
            self.on_event(kind, node=str(node), site=self.reception.site(node), **({"reason": why} if why else {}))

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        least = min(self.schedule.minimum, len(shards))
        replies: list[Reply] = []
        for attempt in range(1, self.schedule.attempts + 1):
            replies = self._round(msg, shards, memory, attempt) if shards else []
            if len(replies) >= least:
                break
            fields = {"attempt": attempt, "answers": len(replies), "minimum": least}
            self.on_event(
                "too few answers", round=shards[0].round, reasons=sorted(set(self.dropped.values())), **fields
            )
            self._await(least, [s.client for s in shards])
        else:
            raise UserError(
                f"round {shards[0].round if shards else ''}",
                f"{len(replies)} answers, {least} are the minimum ({'; '.join(sorted(set(self.dropped.values())))})",
                "`mllm-fl deploy status` shows the sites; `mllm-fl deploy resume` goes on from the last round",
            )
        yield from sorted(replies, key=lambda r: r.client)

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        answers: dict[int, Tree] = {}
        for _node, mine, parcel, problem in self._ask("survey", msg, shards, {}):
            for shard in mine:
                if parcel is None:
                    self.dropped[shard.client] = problem
                elif not _failure(parcel, shard.client):
                    answers[shard.client] = parcel.trees.get(f"{shard.client}", {})
                else:
                    self.dropped[shard.client] = _failure(parcel, shard.client)
        for k, why in sorted(self.dropped.items()):
            self.on_event("client dropped from the survey", client=k, reason=why)
        yield from sorted(answers.items())

    def _round(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree], attempt: int) -> list[Reply]:
        replies = []
        for node, mine, parcel, problem in self._ask("train", msg, shards, memory, attempt):
            for shard in mine:
                found = _reply(parcel, shard) if parcel is not None else problem
                if isinstance(found, str):
                    self.dropped[shard.client] = found
                    continue
                reply, lost = found
                if lost:
                    self.on_event(
                        "a client has lost its memory",
                        round=shard.round,
                        client=shard.client,
                        site=self.reception.site(node),
                    )
                replies.append(reply)
        for k, why in sorted(self.dropped.items()):
            node_or_none = self.reception.owner(k)
            site = (
                self.reception.sites[k % len(self.reception.sites)].name
                if node_or_none is None
                else self.reception.site(node_or_none)
            )
            self.on_event("client dropped", round=shards[0].round, client=k, site=site, reason=why)
        return replies

    def _ask(
        self, kind: str, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree], attempt: int = 1
    ) -> Iterator[tuple[int, list[Shard], Parcel | None, str]]:
        """One message to each node that plays some of the clients; (node, its clients, answer or None, why not)."""
        self.dropped = {}
        self._drain()
        self.greet()
        here, by_node = set(self.link.nodes()), dict[int, list[Shard]]()
        for shard in shards:
            node = self.reception.owner(shard.client)
            if node is None or node not in here:
                refused = None if node is not None else self._refusals().get(self._site_of(shard.client))
                self.dropped[shard.client] = f"refused: {refused}" if refused else "its node is not there"
            elif node in self.owing:
                self.dropped[shard.client] = "its node still owes an answer"
            else:
                by_node.setdefault(node, []).append(shard)
        if not by_node:
            return
        t = shards[0].round
        tree = _packed({"w": msg.w, "extra": msg.extra})
        asked = {
            node: self.common
            | {
                "client": self.reception.client(node),
                "round": t,
                "seed": mine[0].seed,
                "clients": [s.client for s in mine],
                "remembered": {str(s.client): _pointer(memory.get(s.client, {})) for s in mine},
                "checkpointed": (t - 1) // self.every * self.every,
            }
            for node, mine in by_node.items()
        }
        limit = 4 * (nbytes(msg.w) + nbytes(msg.extra))
        for node, parcel, problem in self._exchange(kind, asked, tree, t, limit, attempt):
            yield node, by_node[node], parcel, problem

    def _exchange(
        self, kind: str, facts: Mapping[int, dict[str, Any]], tree: Packed, t: int, limit: int = 0, attempt: int = 1
    ) -> Iterator[tuple[int, Parcel | None, str]]:
        """Send, and take what comes until the deadline; each node's answer once, unpacked, or why there is none."""
        nodes = list(facts)
        letters = [(node, kind, with_facts(tree, facts[node])) for node in nodes]
        since_when, looked = self.link.nodes(), time.monotonic()
        ids = self.link.send(letters, str(t), self.schedule.deadline)
        start = time.monotonic()
        up = wire_up = wire_down = 0
        for node, i, letter in zip(nodes, ids, letters, strict=True):
            if i is None:
                yield node, None, "the message was not taken"
            else:
                self.owing[node] = i
                wire_down += letter[2].nbytes
        pending = {i: node for node, i in zip(nodes, ids, strict=True) if i is not None}
        while pending and time.monotonic() - start < self.schedule.deadline + GRACE:
            since = round(time.monotonic() - start, 1)
            late = [self.reception.site(n) for n in pending.values()]
            self.on_state({"kind": kind, "round": t, "attempt": attempt, "waiting_for": late, "seconds": since})
            for answer in self.link.collect(list(pending)):
                if answer.to not in pending:
                    continue
                node = pending.pop(answer.to)
                self.owing.pop(node, None)
                parcel, problem = self._opened(answer, limit * max(1, len(facts[node].get("clients", ()))))
                if answer.packed is not None:
                    wire_up += answer.packed.nbytes
                    up += payload(answer.packed) if parcel is not None else 0
                yield node, parcel, problem
            if pending and time.monotonic() - looked > LOOK:
                now, looked = self.link.nodes(), time.monotonic()
                for i, node in list(
                    pending.items()
                ):  # Flower says nothing about a message whose node came back without it
                    if node in now and now[node] != since_when.get(node):
                        del pending[i]
                        self.owing.pop(node, None)
                        yield node, None, "its node was started again"
            if pending:
                time.sleep(self.schedule.poll)
        for node in pending.values():
            yield node, None, "no answer before the deadline"
        seconds = round(time.monotonic() - start, 3)
        wire = {
            "wire_up": wire_up,
            "wire_down": wire_down,
            "payload_up": up,
            "payload_down": payload(tree) * len(nodes),
        }
        self.on_event(f"{kind} exchanged", round=t, attempt=attempt, nodes=len(nodes), seconds=seconds, **wire)

    def _opened(self, answer: Answer, limit: int) -> tuple[Parcel | None, str]:
        if answer.packed is None:
            return None, answer.problem
        try:
            parcel = unpack(answer.packed, limit + ROOM)
        except WireError as e:
            return None, f"unreadable answer: {e}"
        if parcel.facts.get("refused") and "site" not in parcel.facts:
            return None, str(parcel.facts.get("say") or parcel.facts["refused"])[:200]
        return parcel, ""

    def _drain(self) -> None:
        """Take what came too late, so that a node that has answered by now gets its next message."""
        if not self.owing:
            return
        by_id = {i: node for node, i in self.owing.items()}
        for answer in self.link.collect(list(by_id)):
            node = by_id[answer.to]
            del self.owing[node]
            self.on_event(
                "late answer", site=self.reception.site(node), reason=answer.problem or "it came after its round"
            )

    def _await(self, least: int, clients: Sequence[int]) -> None:
        """Until so many of the clients can be reached, or ``wait`` seconds have passed."""
        until = time.monotonic() + self.schedule.wait
        while time.monotonic() < until:
            self._drain()
            self.greet()
            here = set(self.link.nodes())
            ready = [k for k in clients if (n := self.reception.owner(k)) in here and n not in self.owing]
            if len(ready) >= least:
                return
            gone = sorted({self._site_of(k) for k in clients if k not in ready})
            self.on_state({"waiting_for": gone, "refused": self._refusals()})
            time.sleep(self.schedule.poll)

    def _site_of(self, client: int) -> str:
        return self.reception.sites[client % len(self.reception.sites)].name

    def _refusals(self) -> dict[str, str]:
        return {self.reception.site(n): why for n, why in self.reception.refused.items()}


def _packed(trees: dict[str, Tree]) -> Packed:
    return pack(Parcel({}, trees))


def _pointer(kept: Tree) -> int:
    return int(kept[POINTER]) if POINTER in kept else 0


def _failure(parcel: Parcel, client: int) -> str:
    said = _about(parcel, client)
    return "its node did not answer for it" if said is None else str(said.get("problem", ""))[:200]


def _about(parcel: Parcel, client: int) -> dict[str, Any] | None:
    told: Iterable[Any] = parcel.facts.get("told", ())
    return next((x for x in told if isinstance(x, dict) and x.get("client") == client), None)


def _reply(parcel: Parcel, shard: Shard) -> tuple[Reply, bool] | str:
    """A client's answer in the engine's form and whether it had lost its memory, or why it is none."""
    problem = _failure(parcel, shard.client)
    said = _about(parcel, shard.client)
    if problem or said is None:
        return problem
    try:
        weight, seconds = float(said["weight"]), float(said["seconds"])
        metrics = {str(k): float(v) for k, v in said["metrics"].items()}
        remembers, lost = bool(said["remembers"]), bool(said.get("lost"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return "its answer is not in our form"
    k = shard.client
    update = Update(k, parcel.trees.get(f"{k}/w", {}), weight, parcel.trees.get(f"{k}/extra", {}), metrics)
    kept = {POINTER: torch.tensor(shard.round)} if remembers else {}
    return Reply(k, update, kept, seconds), lost


def answer_trees(client: int, update: Update) -> dict[str, Tree]:
    """A client's update as the trees of an answer."""
    return {f"{client}/w": dict(update.w), f"{client}/extra": dict(update.extra)}
