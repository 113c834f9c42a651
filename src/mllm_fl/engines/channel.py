"""What the parallel engine's processes say to one another: objects over a socket, images once, in memory that all of them see.

This is multiprocessing's own channel between processes that we started ourselves; nothing is ever written to a file that could be
read back. Tensors travel as plain bytes, contiguous, and arrive in memory that torch allocated, so that a worker computes on equally
aligned numbers. Images (:class:`MemoryPixels` beyond a megabyte, and any pixels that are read from disk) are sent by number.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import tempfile
import threading
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_fl.data.decode import EncodedPixels
from mllm_fl.data.images import ImageSet, MemoryPixels, Pixels, Selected

INLINE = 1 << 20  # bytes up to which images travel with their message
_SIZE = struct.Struct("<Q")
_ZEROS = bytes(64)
_NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
_attached: dict[int, Pixels] = {}  # in a worker: the pixels that were sent to it, by number


_reading = threading.local()  # ``data``: the message that this thread unpacks


def _tensor(at: int, dtype: torch.dtype, shape: tuple[int, ...], parameter: bool) -> Tensor:
    if dtype in _NUMPY:  # a third quicker than torch.frombuffer, and a round of small clients has many leaves
        found = torch.from_numpy(np.ndarray(shape, _NUMPY[dtype], _reading.data, at)).clone()
    elif count := math.prod(shape):
        found = torch.frombuffer(_reading.data, dtype=dtype, count=count, offset=at).view(shape).clone()
    else:
        found = torch.empty(shape, dtype=dtype)
    return nn.Parameter(found, requires_grad=found.is_floating_point()) if parameter else found


def _bytes_of(v: Tensor) -> Any:
    """What ``bytes.join`` takes: the numbers of a detached tensor, contiguous."""
    if not (v.is_cpu and v.is_contiguous()):
        v = v.cpu().contiguous()
    try:
        return v.numpy()
    except TypeError:  # NumPy has no such numbers
        return v.view(-1).view(torch.uint8).numpy()


def _pixels(number: int) -> Pixels:
    return _attached[number]


class _Packer(ForkingPickler):
    """Tensors' bytes go into ``tensors``, each at a multiple of 64; the rest into ``file``."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int]) -> None:
        super(ForkingPickler, self).__init__(file, 5)
        self.numbers, self.used = numbers, set[int]()
        self.tensors: list[Any] = []
        self.at = 0

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            at, size = self.at, obj.nbytes
            if size:
                self.tensors.append(_bytes_of(obj.detach()))
                if size % 64:
                    self.tensors.append(_ZEROS[size % 64 :])
                self.at += size + -size % 64
            return _tensor, (at, obj.dtype, tuple(obj.shape), type(obj) is not Tensor and isinstance(obj, nn.Parameter))
        if id(obj) in self.numbers:
            self.used.add(self.numbers[id(obj)])
            return _pixels, (self.numbers[id(obj)],)
        if isinstance(obj, MemoryPixels):
            return MemoryPixels, (obj.tensor,)  # images as they were before resizing are looked at by leak checks only
        return NotImplemented


def pack(obj: Any, numbers: dict[int, int] | None = None) -> tuple[bytes, set[int]]:
    """``obj`` as one run of bytes (the tensors' size, tensors, the rest), and the numbers of the images that it refers to.

    ``numbers``: by ``id``, the pixels that are sent apart (:class:`Shelf`).
    """
    body = io.BytesIO()
    packer = _Packer(body, numbers or {})
    packer.dump(obj)
    return b"".join([_SIZE.pack(packer.at), *packer.tensors, body.getbuffer()]), packer.used


def unpack(data: bytearray) -> Any:
    """The inverse of :func:`pack`; nothing refers to ``data`` afterwards."""
    view = memoryview(data)[_SIZE.size :]
    (size,) = _SIZE.unpack_from(data, 0)
    _reading.data = view[:size]
    try:
        return ForkingPickler.loads(view[size:])
    finally:
        _reading.data = None


def send(conn: Connection, packed: bytes) -> None:
    """One message; its size goes ahead, so that the other side receives into memory it may write to."""
    conn.send_bytes(_SIZE.pack(len(packed)))
    conn.send_bytes(packed)


def receive(conn: Connection) -> Any:
    """The next message's object.

    Raises:
        EOFError: the other side is gone.
    """
    (size,) = _SIZE.unpack(conn.recv_bytes())
    data = bytearray(size)
    conn.recv_bytes_into(data)
    return unpack(data)


class Block:
    """Bytes that several processes see: an open file that has no name, mapped into memory."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.bytes = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)

    @classmethod
    def new(cls, size: int) -> Block:
        """A block of ``size`` zeros."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("mllm-fl")  # no limit of a small /dev/shm applies to it
        else:
            with tempfile.TemporaryFile() as f:
                fd = os.dup(f.fileno())
        os.ftruncate(fd, size)
        return cls(fd, size)


class Shelf:
    """The parent's side: which images were numbered, and how each reaches a worker."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # id of a pixels object -> its number
        self._kept: list[tuple[Pixels, Block | None, tuple[int, ...]]] = []

    def put(self, images: ImageSet) -> None:
        """Number the pixels of ``images``, unless they are few enough to travel with a message; decode what is not yet.

        Pixels that lie decoded in memory are moved into memory that workers see: they keep their values, and the old bytes are given
        back. Those that are decoded at every read are sent as they are; each worker decodes for itself.
        """
        pixels: Pixels = images.pixels
        positions = np.arange(len(images))
        while isinstance(pixels, Selected):
            positions = pixels.positions[positions]
            pixels = pixels.pixels
        if id(pixels) not in self.numbers:
            block: Block | None = None
            shape: tuple[int, ...] = ()
            if isinstance(pixels, MemoryPixels):
                shape = tuple(pixels.tensor.shape)
                if pixels.tensor.numel() <= INLINE:
                    return
                block = Block.new(pixels.tensor.numel())
                moved = torch.from_numpy(block.bytes).view(shape)
                moved.copy_(pixels.tensor)
                pixels.tensor.set_(moved.untyped_storage(), 0, moved.shape, moved.stride())
            elif isinstance(pixels, EncodedPixels):
                blocks: list[Block] = []

                def memory(shape: tuple[int, ...]) -> np.ndarray:
                    blocks.append(Block.new(int(np.prod(shape))))
                    return blocks[0].bytes.reshape(shape)

                found = pixels.move(memory)
                if found is not None:
                    block, shape = blocks[0], found.shape
            self.numbers[id(pixels)] = len(self._kept)
            self._kept.append((pixels, block, shape))
        if isinstance(pixels, EncodedPixels):
            pixels.prepare(positions)

    def send(self, conn: Connection, number: int, pid: int) -> None:
        """Hand the pixels with this number to the worker ``pid`` at the other end."""
        pixels, block, shape = self._kept[number]
        if block is None:
            send(conn, pack(("pixels", number, pixels))[0])
        else:
            send(conn, pack(("shared", number, shape))[0])
            send_handle(conn, block.fd, pid)

    def close(self) -> None:
        """Close the files; memory that tensors still lie in stays until they are gone."""
        for _, block, _ in self._kept:
            if block is not None:
                os.close(block.fd)
        self._kept.clear()
        self.numbers.clear()


def attach(conn: Connection, kind: str, number: int, what: Any) -> None:
    """The worker's side of :meth:`Shelf.send`."""
    if kind == "shared":
        fd = recv_handle(conn)
        size = int(np.prod(what))
        what = MemoryPixels(torch.from_numpy(Block(fd, size).bytes).view(what))
        os.close(fd)
    _attached[number] = what
