"""What travels between a federation's machines: named tensors as .npy without pickle, and plain facts as JSON.

A :class:`Packed` is what lies on the wire; it knows no torch, so that a process which only passes it on need not load it. bfloat16, which .npy does
not know, travels as int16 of the same bits, and the note says so. The order of the leaves is kept: sums over a tree are then the same on both sides.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mllm_fl.trees import Tree

PROTOCOL = 1
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "bfloat16")
HEAD = 4096  # bytes that the head of one .npy may take at most


class WireError(ValueError):
    """Something arrived that is not in this form; the text names no value and no path."""


class Leaf(NamedTuple):
    """One tensor on the wire: which tree, its name there, its torch dtype in words, its shape."""

    tree: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers alone, without the head of the .npy."""
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Packed:
    """Facts, and one .npy a leaf. ``note`` is JSON: ``{"protocol", "facts", "leaves"}``."""

    note: str
    blobs: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that travel: the note and the .npy files with their heads."""
        return len(self.note.encode()) + sum(map(len, self.blobs))


@dataclass(frozen=True)
class Parcel:
    """Facts (whatever JSON can say) and named trees."""

    facts: dict[str, Any] = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)


def leaves(packed: Packed) -> list[Leaf]:
    """What the note says about the leaves, checked.

    Raises:
        WireError: not a note of this protocol, an unknown dtype, or another number of leaves than of .npy files.
    """
    try:
        note = json.loads(packed.note)
        found = [Leaf(str(t), str(n), str(d), tuple(int(s) for s in shape)) for t, n, d, shape in note["leaves"]]
        protocol = note["protocol"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise WireError("not a note of mllm-fl") from e
    if protocol != PROTOCOL:
        raise WireError(f"protocol {protocol!r}, not {PROTOCOL}")
    if len(found) != len(packed.blobs):
        raise WireError(f"{len(packed.blobs)} tensors, but {len(found)} are named")
    if len({(leaf.tree, leaf.name) for leaf in found}) != len(found):
        raise WireError("one name twice")
    for leaf in found:
        if leaf.dtype not in DTYPES or any(s < 0 for s in leaf.shape):
            raise WireError(f"dtype {leaf.dtype[:20]!r} or a negative size")
    return found


def pack(parcel: Parcel) -> Packed:
    """The parcel as it travels; tensors are copied to the CPU and made contiguous."""
    import torch

    named: list[Leaf] = []
    blobs: list[bytes] = []
    for tree, content in parcel.trees.items():
        for name, v in content.items():
            dtype = str(v.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise WireError(f"{tree}: {name}: a tensor of {dtype} does not travel")
            flat = v.detach().cpu().contiguous()
            array = (flat.view(torch.int16) if dtype == "bfloat16" else flat).numpy()
            file = io.BytesIO()
            np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
            named.append(Leaf(tree, name, dtype, tuple(v.shape)))
            blobs.append(file.getvalue())
    note = {"protocol": PROTOCOL, "facts": parcel.facts, "leaves": named}
    return Packed(json.dumps(note), tuple(blobs))


def unpack(packed: Packed, limit: int | None = None) -> Parcel:
    """The parcel that :func:`pack` was given; tensors lie in memory that torch allocated.

    ``limit``: bytes of all .npy together beyond which nothing is read.

    Raises:
        WireError: too large, or not what the note says (dtype, shape, length).
    """
    import torch

    if limit is not None and packed.nbytes > limit:
        raise WireError(f"{packed.nbytes} bytes, more than {limit}")
    trees: dict[str, Tree] = {}
    for leaf, blob in zip(leaves(packed), packed.blobs, strict=True):
        stored = "int16" if leaf.dtype == "bfloat16" else leaf.dtype
        if not leaf.nbytes <= len(blob) <= leaf.nbytes + HEAD:
            raise WireError(f"{leaf.name[:60]}: {len(blob)} bytes for {leaf.nbytes}")
        try:
            array = np.load(io.BytesIO(blob), allow_pickle=False)
        except Exception as e:  # a head may be any text: numpy parses it, and fails in many ways
            raise WireError(f"{leaf.name[:60]}: not a .npy") from e
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(stored) or array.shape != leaf.shape:
            raise WireError(f"{leaf.name[:60]}: another dtype or shape than its note says")
        tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(leaf.shape)).clone()
        trees.setdefault(leaf.tree, {})[leaf.name] = tensor.view(torch.bfloat16) if leaf.dtype == "bfloat16" else tensor
    facts = json.loads(packed.note).get("facts")
    if not isinstance(facts, dict):
        raise WireError("facts are not a table")
    return Parcel(facts, trees)


def payload(packed: Packed) -> int:
    """Bytes of the tensors' numbers alone: what a method declares, to be held against it."""
    return sum(leaf.nbytes for leaf in leaves(packed))


def with_facts(packed: Packed, facts: dict[str, Any]) -> Packed:
    """The same tensors with other facts: one broadcast, packed once, for many nodes."""
    note = json.loads(packed.note) | {"facts": facts}
    return Packed(json.dumps(note), packed.blobs)
