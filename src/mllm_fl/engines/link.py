"""The line to the nodes, whoever carries it: what the remote engine asks of Flower, and what a test can play."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from mllm_fl.engines.wire import Packed


class Answer(NamedTuple):
    """What came back for the message ``to``: the node's answer, or None and why there is none."""

    to: str
    packed: Packed | None
    problem: str


class Link(Protocol):
    """Messages to nodes and their answers. No call waits."""

    def nodes(self) -> dict[int, str]:
        """The nodes that can be reached now, in order of number, each with the time since when (in any words that change when it is started anew)."""
        ...

    def send(self, letters: Iterable[tuple[int, str, Packed]], group: str, ttl: float) -> list[str | None]:
        """Hand over (node, kind, content); the messages' ids, None for one that was not taken. After ``ttl`` seconds a message is worth nothing."""
        ...

    def collect(self, ids: Iterable[str]) -> list[Answer]:
        """What has come for these messages since the last call; each answer is given once."""
        ...
