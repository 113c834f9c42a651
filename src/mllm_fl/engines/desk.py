"""What the clients of Flower's simulation need beside their message: the task once, their images in memory that all processes map.

A :class:`Desk` stands in the engine's process, behind a Unix socket in a folder that only its owner may enter; the processes that Ray starts ask it by :func:`fetch`.
Flower's messages then carry what they carry between real machines, and no image is sent twice. The form is the parallel engine's (engines/channel.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

from mllm_fl.algorithms.base import Shard
from mllm_fl.engines import channel
from mllm_fl.engines.worker import Setup
from mllm_fl.errors import UserError

_lines: dict[str, Connection] = {}  # in a client's process: the open lines, by address
_setups: dict[str, Setup] = {}  # and what came over them first


class Desk:
    """The engine's side; a context manager. ``address``: of its socket."""

    def __init__(self, setup: Setup) -> None:
        self.shelf = channel.Shelf()
        self._tickets: dict[int, tuple[bytes, set[int]]] = {}
        self._numbers = itertools.count(1)
        for images in (setup.task.unlabelled, setup.task.labelled):
            if images is not None:
                self.shelf.put(images)
        self._setup = channel.pack(("setup", setup), self.shelf.numbers)
        self._folder = Path(tempfile.mkdtemp(prefix="mllm-fl-"))
        self.address = str(self._folder / "desk")
        try:
            self._door = Listener(self.address, "AF_UNIX")
        except OSError as e:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise UserError(self.address, f"no socket can be made ({e})", "set TMPDIR to a shorter path") from e
        threading.Thread(target=self._open, daemon=True, name="flower-sim desk").start()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._door.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.shelf.close()

    def put(self, shard: Shard) -> int:
        """Lay a client's images ready; the number under which they are fetched."""
        self.shelf.put(shard.images)
        number = next(self._numbers)
        self._tickets[number] = channel.pack(("shard", shard), self.shelf.numbers)
        return number

    def clear(self, number: int) -> None:
        """Nobody will ask for this any more."""
        self._tickets.pop(number, None)

    def _open(self) -> None:
        while True:
            try:
                line = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: Connection) -> None:
        has: set[int] = set()
        packs = [self._setup]
        with contextlib.suppress(EOFError, OSError, ValueError, KeyError), line:
            while True:
                asked = json.loads(line.recv_bytes())
                packs.append(self._tickets[asked["ticket"]])
                for packed, used in packs:
                    for number in sorted(used - has):
                        self.shelf.send(line, number, asked["pid"])
                    has |= used
                    channel.send(line, packed)
                packs = []


def fetch(address: str, ticket: int) -> tuple[Setup, Shard]:
    """A client's side: the task, and the images that were laid ready under ``ticket``.

    Raises:
        Exception: the engine is gone, or what it sends cannot be imported here.
    """
    if address not in _lines:
        _lines[address] = Client(address, "AF_UNIX")
    line = _lines[address]
    try:
        line.send_bytes(json.dumps({"ticket": ticket, "pid": os.getpid()}).encode())
        while True:
            message: tuple[Any, ...] = channel.receive(line)
            if message[0] == "setup":
                _setups[address] = message[1]
            elif message[0] == "shard":
                return _setups[address], message[1]
            else:
                channel.attach(line, *message)
    except BaseException:
        _lines.pop(address).close()
        raise
