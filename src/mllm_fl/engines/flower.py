"""Flower, and the only file that knows it: our messages over its Grid on the server, our answers in its ClientApp on the nodes.

Only what Flower documents is used (``flwr.app``, ``flwr.serverapp``, ``flwr.clientapp``), by a round loop of our own: no Strategy. flwr is imported when it is needed, by the two
processes that Flower itself starts.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mllm_fl.engines.link import Answer, Link
from mllm_fl.engines.wire import Packed, WireError, leaves
from mllm_fl.errors import UserError

KINDS = {"hello": "query", "train": "train", "survey": "query.survey"}
"""Our kinds of message as Flower's message types."""
WHY = {  # Flower's error codes, in words that say what happened to a node
    0: "unknown error of Flower",
    1: "the app could not be loaded on the node",
    2: "the client stopped with an exception (it is in the node's log)",
    3: "no answer before the deadline",
    4: "its answer came after the deadline",
    5: "the node went away",
    6: "the node refused the message",
    7: "the node could not unpack the app",
    8: "the client's process died",
}

PATIENCE = 300.0
"""Seconds that one call to the SuperLink may take."""

Handle = Callable[[str, Packed, Mapping[str, Any], int], Packed]
"""``handle(kind, packed, node_config, node_id)``: a node's answer to one message."""
Main = Callable[[Link, dict[str, Any], int], None]
"""``main(link, run_config, run_id)``: the server's side of a run."""


class GridLink:
    """Flower's Grid as a :class:`mllm_fl.engines.link.Link`."""

    def __init__(self, grid: Any, patience: float = 0.0) -> None:
        self.grid, self._begun = grid, 0.0
        if patience:
            threading.Thread(target=self._watch, args=(patience, os.getppid()), daemon=True).start()

    def _watch(self, patience: float, parent: int) -> None:
        """Flower's calls do not end when its SuperLink fails in their middle, nor this process with its parent: then end it, so that the run can be resumed."""
        while True:
            time.sleep(1.0)
            begun = self._begun
            if (begun and time.monotonic() - begun > patience) or os.getppid() != parent:
                os._exit(70)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        self._begun = time.monotonic()
        try:
            yield
        finally:
            self._begun = 0.0

    def nodes(self) -> dict[int, str]:
        with self._call():
            found = {int(n.node_id): str(n.last_activated_at) for n in self.grid.get_nodes()}
        return dict(sorted(found.items()))

    def send(self, letters: Iterable[tuple[int, str, Packed]], group: str, ttl: float) -> list[str | None]:
        from flwr.app import Message

        made = [
            Message(to_content(packed), dst_node_id=node, message_type=KINDS[kind], group_id=group, ttl=ttl)
            for node, kind, packed in letters
        ]
        with self._call():
            return [str(i) if i else None for i in self.grid.push_messages(made)]

    def collect(self, ids: Iterable[str]) -> list[Answer]:
        answers = []
        with self._call():
            messages = list(self.grid.pull_messages(list(ids)))
        for message in messages:
            to = str(message.metadata.reply_to_message_id)  # the sender of errors 3, 4, 5 is the SuperLink
            if message.has_error():
                answers.append(Answer(to, None, WHY.get(int(message.error.code), WHY[0])))
                continue
            try:
                answers.append(Answer(to, from_content(message.content), ""))
            except WireError as e:
                answers.append(Answer(to, None, f"unreadable answer: {e}"))
        return answers


def to_content(packed: Packed) -> Any:
    """Our form as Flower's RecordDict: each tensor an Array whose data is its .npy, the note in a ConfigRecord."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {
        str(i): Array(leaf.dtype, leaf.shape, "numpy.ndarray", blob)
        for i, (leaf, blob) in enumerate(zip(leaves(packed), packed.blobs, strict=True))
    }
    return RecordDict({"note": ConfigRecord({"json": packed.note}), "leaves": ArrayRecord(arrays)})


def from_content(content: Any) -> Packed:
    """The inverse of :func:`to_content`; nothing is decoded yet.

    Raises:
        WireError: a RecordDict of another app.
    """
    try:
        arrays, note = content["leaves"], content["note"]["json"]
        return Packed(str(note), tuple(bytes(arrays[str(i)].data) for i in range(len(arrays))))
    except (KeyError, TypeError, AttributeError) as e:
        raise WireError("not a message of mllm-fl") from e


def server_app(main: Main) -> Any:
    """Flower's ServerApp that runs ``main``."""
    try:
        from flwr.serverapp import ServerApp
    except ImportError as e:
        raise needs_flower() from e
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator,unused-ignore]
    def run(grid: Any, context: Any) -> None:
        main(GridLink(grid, PATIENCE), dict(context.run_config), int(context.run_id))

    return app


def client_app(handle: Handle) -> Any:
    """Flower's ClientApp that answers every message by ``handle``, which must not raise: an exception's text would travel."""
    try:
        from flwr.app import Message
        from flwr.clientapp import ClientApp
    except ImportError as e:
        raise needs_flower() from e
    app = ClientApp()

    def answering(kind: str) -> Callable[[Any, Any], Any]:
        def answer(message: Any, context: Any) -> Any:
            packed = handle(kind, from_content(message.content), dict(context.node_config), int(context.node_id))
            return Message(to_content(packed), reply_to=message)

        return answer

    app.query()(answering("hello"))
    app.query("survey")(answering("survey"))
    app.train()(answering("train"))
    return app


def needs_flower() -> UserError:
    """The one line for a machine without Flower."""
    return UserError("flower", "flwr is not installed here", "pip install 'mllm-fl[flower]'")
