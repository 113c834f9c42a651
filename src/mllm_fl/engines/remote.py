"""The engine whose clients are on other machines: one message a node and round, a deadline, and a record of who was dropped and why.

A round goes to the nodes that are there, once each, with everything that their clients need; what they remember between rounds stays with them, and the server keeps only which
round's memory is the valid one (so that a rejected update, or a server that was killed before its checkpoint, leaves no trace in it). Answers that do not come in time are
dropped and the mean is over the others: the weights are renormalised by the mean itself. With less than ``minimum`` answers the round is played again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from mllm_fl.algorithms.base import Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.answers import failure, pointer, reply_of
from mllm_fl.engines.base import OnEvent, Reply, ignored
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.exchange import OnState, Post, Schedule
from mllm_fl.engines.link import Link
from mllm_fl.engines.reception import Reception
from mllm_fl.engines.wire import Packed, Parcel, pack
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree, nbytes


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
        on_state: OnState = lambda state: None,
    ) -> None:
        self.link, self.reception, self.task, self.common = link, reception, task, dict(common)
        self.schedule, self.every = schedule or Schedule(), checkpoint_every
        self.on_event, self.on_state = on_event, on_state
        self.post = Post(link, self.schedule, reception.site, on_event, on_state)
        self.dropped: dict[int, str] = {}
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
        unknown = [n for n in unknown if n not in self.post.owing]
        if not unknown:
            return
        facts = self.common | {"classes": list(self.reception.class_names), "images": self.reception.images}
        for node, parcel, problem in self.post.exchange(
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
                elif not failure(parcel, shard.client):
                    answers[shard.client] = parcel.trees.get(f"{shard.client}", {})
                else:
                    self.dropped[shard.client] = failure(parcel, shard.client)
        for k, why in sorted(self.dropped.items()):
            self.on_event("client dropped from the survey", client=k, reason=why)
        yield from sorted(answers.items())

    def _round(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree], attempt: int) -> list[Reply]:
        replies = []
        for node, mine, parcel, problem in self._ask("train", msg, shards, memory, attempt):
            for shard in mine:
                found = reply_of(parcel, shard) if parcel is not None else problem
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
        self.post.drain()
        self.greet()
        here, by_node = set(self.link.nodes()), dict[int, list[Shard]]()
        for shard in shards:
            node = self.reception.owner(shard.client)
            if node is None or node not in here:
                refused = None if node is not None else self._refusals().get(self._site_of(shard.client))
                self.dropped[shard.client] = f"refused: {refused}" if refused else "its node is not there"
            elif node in self.post.owing:
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
                "remembered": {str(s.client): pointer(memory.get(s.client, {})) for s in mine},
                "checkpointed": (t - 1) // self.every * self.every,
            }
            for node, mine in by_node.items()
        }
        limit = 4 * (nbytes(msg.w) + nbytes(msg.extra))
        for node, parcel, problem in self.post.exchange(kind, asked, tree, t, limit, attempt):
            yield node, by_node[node], parcel, problem

    def _await(self, least: int, clients: Sequence[int]) -> None:
        """Until so many of the clients can be reached, or ``wait`` seconds have passed."""
        until = time.monotonic() + self.schedule.wait
        while time.monotonic() < until:
            self.post.drain()
            self.greet()
            here = set(self.link.nodes())
            ready = [k for k in clients if (n := self.reception.owner(k)) in here and n not in self.post.owing]
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
