"""One exchange with a federation's nodes: a message to each, and what comes back until the deadline; each answer once, opened, or why there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_fl.engines.base import OnEvent
from mllm_fl.engines.link import Answer, Link
from mllm_fl.engines.wire import Packed, Parcel, WireError, payload, unpack, with_facts
from mllm_fl.errors import UserError

GRACE = 2.0  # seconds after the deadline in which the SuperLink says which messages have run out
LOOK = 2.0  # seconds between two looks at which nodes were started again
ROOM = 16 << 20  # bytes that an answer may have beyond four times what was sent

OnState = Callable[[dict[str, Any]], None]
"""Told what is going on, for ``mllm-fl deploy status``."""


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


class Post:
    """Messages to nodes and their answers, with a deadline. ``name``: a node's name in records.

    ``owing``: node -> the message that it has not answered; it gets no other until it has.
    """

    def __init__(
        self, link: Link, schedule: Schedule, name: Callable[[int], str], on_event: OnEvent, on_state: OnState
    ) -> None:
        self.link, self.schedule, self.name = link, schedule, name
        self.on_event, self.on_state = on_event, on_state
        self.owing: dict[int, str] = {}

    def exchange(
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
            late = [self.name(n) for n in pending.values()]
            self.on_state({"kind": kind, "round": t, "attempt": attempt, "waiting_for": late, "seconds": since})
            for answer in self.link.collect(list(pending)):
                if answer.to not in pending:
                    continue
                node = pending.pop(answer.to)
                self.owing.pop(node, None)
                parcel, problem = _opened(answer, limit * max(1, len(facts[node].get("clients", ()))))
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

    def drain(self) -> None:
        """Take what came too late, so that a node that has answered by now gets its next message."""
        if not self.owing:
            return
        by_id = {i: node for node, i in self.owing.items()}
        for answer in self.link.collect(list(by_id)):
            node = by_id[answer.to]
            del self.owing[node]
            self.on_event("late answer", site=self.name(node), reason=answer.problem or "it came after its round")


def _opened(answer: Answer, limit: int) -> tuple[Parcel | None, str]:
    if answer.packed is None:
        return None, answer.problem
    try:
        parcel = unpack(answer.packed, limit + ROOM)
    except WireError as e:
        return None, f"unreadable answer: {e}"
    if parcel.facts.get("refused") and "site" not in parcel.facts:
        return None, str(parcel.facts.get("say") or parcel.facts["refused"])[:200]
    return parcel, ""
