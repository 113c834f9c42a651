"""What clients remember between their visits: on disk, the most recently used of it also in RAM.

A folder of segments. A segment takes everything that is remembered between two checkpoints, one tree after another, and is never changed afterwards;
an index of 40 bytes a client says where each client's last tree lies, and is part of the checkpoint (:meth:`ClientMemory.commit`). So a
checkpoint costs what the clients of its rounds remember, not what all clients do, and a run that is resumed at a checkpoint sees the memories
of that checkpoint: segments begun after it are not in its index and are thrown away. Segments that the last checkpoint no longer needs go
once it is whole (:meth:`ClientMemory.prune`). Trees of clients visited long ago are moved together when more than half
of the bytes on disk are out of date. What lies where is a function of the run alone: a resumed run writes equal bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.trees import Tree

RAM = 16 << 20
"""Bytes of trees that are kept in RAM beside the disk; the operating system's own cache of files comes on top, where there is room."""
SLACK = 64 << 20
"""Bytes of out-of-date trees that are not worth moving the others for."""
Place = tuple[int, int, int, int]  # segment, offset, length, check
NOWHERE: Place = (0, 0, 0, 0)  # a client that remembers nothing any more


class ClientMemory(MutableMapping[int, Tree]):
    """Client number -> its tree, made anew each time; a client that remembers nothing is not in it.

    ``folder`` is made when there is something to remember. ``round``: of the checkpoint that the run continues from, 0 without one; ``index``:
    what :meth:`commit` returned for it, int64 (clients, 5). ``ram``: bytes of trees kept in RAM.

    Raises:
        UserError: the index needs a segment that is not there; on reading, a tree that is damaged.
    """

    def __init__(self, folder: Path, round: int = 0, index: Tensor | None = None, ram: int = RAM) -> None:
        self.folder, self.limit = folder, ram
        self._table = np.zeros((0, 5), dtype=np.int64) if index is None else index.numpy().copy()  # sorted by client
        self._fresh: dict[int, Place] = {}  # since the last commit
        self._segment = round + 1
        self._file: BinaryIO | None = None
        self._end = 0
        self._cache: OrderedDict[int, bytes] = OrderedDict()  # not tensors: a small one takes several times its bytes
        self._cached = 0
        for number in self._needed():
            if not self._path(number).is_file():
                problem = "no such file, but the checkpoint needs it"
                raise UserError(
                    self._path(number), problem, "delete the run folder to start this run from its beginning"
                )
        self.prune()

    def __getitem__(self, client: int) -> Tree:
        data = self._cache.get(client)
        if data is None:
            place = self._place(client)
            if place is None:
                raise KeyError(client)
            data = self._bytes(place)
            self._keep(client, data)
        else:
            self._cache.move_to_end(client)
        try:
            tree: Tree = load(data)
        except SafetensorError as e:
            raise UserError(self.folder, f"the memory of client {client} cannot be read ({e})") from e
        return tree

    def __setitem__(self, client: int, tree: Tree) -> None:
        if not tree:
            self.pop(client, None)
            return
        data = save({k: v.detach().contiguous() for k, v in tree.items()})
        self._fresh[client] = self._write(data)
        self._keep(client, data)

    def __delitem__(self, client: int) -> None:
        if client not in self:
            raise KeyError(client)
        self._fresh[client] = NOWHERE
        self._forget(client)

    def __contains__(self, client: object) -> bool:
        return isinstance(client, int) and self._place(client) is not None

    def __iter__(self) -> Iterator[int]:
        known = set(self._table[:, 0].tolist()) | self._fresh.keys()
        return iter(sorted(k for k in known if k in self))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def in_ram(self) -> int:
        """Bytes of trees in RAM now."""
        return self._cached

    def commit(self, round: int) -> Tensor:
        """Everything remembered so far, on the disk; returns the index, to be kept in the checkpoint of ``round``."""
        table = self._merged()
        if self._wasted(table) > max(int(table[:, 3].sum()), SLACK):
            for client, segment, *rest in table.tolist():
                if segment != self._segment:
                    self._fresh[client] = self._write(self._bytes((segment, *rest)))
            table = self._merged()
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._table, self._fresh, self._file = table, {}, None
        self._segment = round + 1
        return torch.from_numpy(table.copy())

    def prune(self) -> None:
        """Delete what the last index does not need: call it when the checkpoint that holds the index is whole."""
        needed = {self._path(number).name for number in self._needed()}
        if self._file is None and self.folder.is_dir():
            for path in self.folder.glob("segment-*"):
                if path.name not in needed:
                    path.unlink()

    def _place(self, client: int) -> Place | None:
        place = self._fresh.get(client)
        if place is None:
            row = int(np.searchsorted(self._table[:, 0], client))
            if row < len(self._table) and self._table[row, 0] == client:
                _, segment, offset, length, check = self._table[row].tolist()
                place = (segment, offset, length, check)
        return None if place == NOWHERE else place

    def _merged(self) -> np.ndarray:
        """The index with what is fresh in it, sorted by client."""
        if not self._fresh:
            return self._table
        fresh = np.array([(k, *place) for k, place in self._fresh.items()], dtype=np.int64)
        old = self._table[~np.isin(self._table[:, 0], fresh[:, 0])]
        both = np.concatenate([old, fresh[fresh[:, 1] > 0]])
        return both[np.argsort(both[:, 0], kind="stable")]

    def _needed(self) -> list[int]:
        return [int(n) for n in np.unique(self._table[:, 1])]

    def _wasted(self, table: np.ndarray) -> int:
        """Bytes in the segments that ``table`` needs which no client's last tree takes up."""
        if self._file is not None:
            self._file.flush()
        sizes = sum(self._path(int(n)).stat().st_size for n in np.unique(table[:, 1]))
        return sizes - int(table[:, 3].sum())

    def _path(self, number: int) -> Path:
        return self.folder / f"segment-{number:06d}"

    def _write(self, data: bytes) -> Place:
        if self._file is None:
            self.folder.mkdir(exist_ok=True)
            self._file, self._end = open(self._path(self._segment), "wb"), 0  # noqa: SIM115 (closed by commit)
        self._file.write(data)
        place = (self._segment, self._end, len(data), _check(data))
        self._end += len(data)
        return place

    def _bytes(self, place: Place) -> bytes:
        segment, offset, length, check = place
        if self._file is not None and segment == self._segment:
            self._file.flush()
        path = self._path(segment)
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read(length)
        if len(data) != length or _check(data) != check:
            raise UserError(path, "truncated or damaged", "delete the run folder to start this run from its beginning")
        return data

    def _keep(self, client: int, data: bytes) -> None:
        """Into RAM, the least recently used going out beyond the limit."""
        self._forget(client)
        self._cache[client] = data
        self._cached += len(data)
        while self._cached > self.limit and self._cache:
            self._forget(next(iter(self._cache)))

    def _forget(self, client: int) -> None:
        self._cached -= len(self._cache.pop(client, b""))


def _check(data: bytes) -> int:
    """64 bits of SHA-256, as an int64."""
    return int.from_bytes(sha256(data).digest()[:8], "big", signed=True)
