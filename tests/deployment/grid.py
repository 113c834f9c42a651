"""Flower in one process: a Grid without a network, with Flower's own messages, serialised as for the wire.

Nodes answer when messages are pushed; what goes wrong on the way is planted by node number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

Fault = Callable[[Message, Callable[[], Message]], Message | None]
"""``fault(message, answer)``: what comes back in the answer's place; None: nothing."""


def wired(content: Any) -> tuple[Any, int]:
    """A record as it arrives at the other end, and the bytes that its objects take."""
    objects = get_all_nested_objects(content)
    raw = {i: o.deflate() for i, o in objects.items()}
    size = sum(map(len, raw.values()))
    return inflate_object_from_contents(content.object_id, raw), size


class FakeGrid(Grid):  # type: ignore[misc]
    """``nodes``: node number -> node configuration. ``faults``: node number -> what goes wrong there."""

    def __init__(
        self, app: Any, nodes: Mapping[int, dict[str, Any]], faults: Mapping[int, Fault] | None = None
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.app, self.nodes, self.faults = app, dict(nodes), dict(faults or {})
        self.since: dict[int, str] = {}  # node -> when it was started
        self.waiting: dict[str, Message] = {}
        self.pushed: list[tuple[int, str]] = []  # (node, message type)
        self.ttls: set[float] = set()
        self.bytes_down = self.bytes_up = 0
        self._numbers = itertools.count(1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n, last_activated_at=self.since.get(n, "")) for n in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._push(m) for m in messages]

    def _push(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        self.pushed.append((node, message.metadata.message_type))
        self.ttls.add(message.metadata.ttl)
        if node not in self.nodes:
            return None
        number = str(next(self._numbers))
        message.metadata.__dict__["_message_id"] = number
        content, size = wired(message.content)
        message.content = content
        self.bytes_down += size

        def answer() -> Message:
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            return self.app(message, context)

        reply = self.faults[node](message, answer) if node in self.faults else answer()
        if reply is not None:
            if not reply.has_error():
                content, size = wired(reply.content)
                reply.content = content
                self.bytes_up += size
            self.waiting[number] = reply
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.waiting.pop(i) for i in message_ids if i in self.waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("sleeps three seconds; our loop pushes and pulls")


def failing(code: int, reason: str = "") -> Fault:
    """What Flower's SuperLink says in the place of an answer."""
    return lambda message, answer: Message(Error(code, reason), reply_to=message)
