"""A process that stays: Flower starts a new one for every message, and most of its seconds would go into importing torch.

``mllm-fl deploy node --worker`` starts it beside the SuperNode. Flower's short-lived process hands the message to it over a Unix socket in the site's state folder (which only
its owner may enter) and passes the answer on; it imports no torch itself. Where no worker answers, it does the work itself, with the same result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_fl.engines.wire import Packed

SOCKET = "worker.sock"
_HEAD = struct.Struct("<QQ")  # bytes of the head, number of blobs
_SIZE = struct.Struct("<Q")


def ask(kind: str, packed: Packed, node_config: Mapping[str, Any], node: int) -> Packed:
    """The node's answer, by its worker where there is one."""
    place = Path(str(node_config.get("state", ""))) / SOCKET
    if node_config.get("state") and place.exists():
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(_short(place))
                _send(
                    line, {"kind": kind, "config": dict(node_config), "node": node, "note": packed.note}, packed.blobs
                )
                head, blobs = _receive(line)
                return Packed(str(head["note"]), blobs)
        except (OSError, EOFError, ValueError, KeyError):
            pass  # it is gone, or went while it worked: memory is kept by round, so doing it again is doing it once
    from mllm_fl.deployment.node import handle

    return handle(kind, packed, node_config, node)


def serve(state: Path) -> None:
    """Answer until killed; one message at a time, as a SuperNode sends them."""
    import torch

    import mllm_fl.engines.local
    import mllm_fl.stages.chain  # noqa: F401 (what a message would import)
    from mllm_fl.deployment.node import handle

    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    place = state / SOCKET
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(_short(place))
        os.chmod(place, 0o600)
        door.listen(4)
        while True:
            line, _ = door.accept()
            with line, contextlib.suppress(OSError, EOFError, ValueError, KeyError):
                head, blobs = _receive(line)
                answer = handle(head["kind"], Packed(head["note"], blobs), head["config"], head["node"])
                _send(line, {"note": answer.note}, answer.blobs)


def _short(place: Path) -> str:
    """A socket's path may have 107 bytes; a longer one is reached through its folder's descriptor."""
    if len(str(place).encode()) < 100:
        return str(place)
    folder = os.open(place.parent, os.O_RDONLY)
    return f"/proc/self/fd/{folder}/{place.name}"


def _send(line: socket.socket, head: dict[str, Any], blobs: tuple[bytes, ...]) -> None:
    data = json.dumps(head).encode()
    line.sendall(_HEAD.pack(len(data), len(blobs)) + data)
    for blob in blobs:
        line.sendall(_SIZE.pack(len(blob)))
        line.sendall(blob)


def _receive(line: socket.socket) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    length, count = _HEAD.unpack(_exactly(line, _HEAD.size))
    head = json.loads(_exactly(line, length))
    return head, tuple(_exactly(line, _SIZE.unpack(_exactly(line, _SIZE.size))[0]) for _ in range(count))


def _exactly(line: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = line.recv(min(1 << 20, count - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
