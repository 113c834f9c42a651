"""What travels: every dtype, shape and order comes back bit for bit; whatever else arrives is refused before it is decoded."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from mllm_fl.engines.wire import DTYPES, Packed, Parcel, WireError, leaves, pack, payload, unpack, with_facts
from mllm_fl.trees import digest, nbytes


def leaf(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape) - 2
    return values.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (7,), (2, 3, 4)])
def test_every_leaf_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tree = {"z": leaf(dtype, shape), "a": torch.ones(2)}
    parcel = unpack(pack(Parcel({"round": 3}, {"w": tree})))
    assert digest(parcel.trees["w"]) == digest(tree) and list(parcel.trees["w"]) == ["z", "a"]
    assert parcel.facts == {"round": 3}


def test_bf16_travels_as_its_own_bits_nan_and_all() -> None:
    bits = torch.tensor([0x7FC1, 0x3F80, -0x8000, 0x0001], dtype=torch.int16)
    there = unpack(pack(Parcel({}, {"w": {"x": bits.view(torch.bfloat16)}}))).trees["w"]["x"]
    assert there.dtype == torch.bfloat16 and torch.equal(there.view(torch.int16), bits)


def test_strides_do_not_travel() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    packed = pack(
        Parcel({}, {"w": {"t": x.t(), "cl": torch.ones(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)}})
    )
    assert torch.equal(unpack(packed).trees["w"]["t"], x.t())
    assert unpack(packed).trees["w"]["t"].is_contiguous()


def test_bytes_are_counted_with_and_without_heads() -> None:
    tree = {"x": torch.zeros(10), "n": torch.zeros((), dtype=torch.int64), "h": torch.zeros(3, dtype=torch.bfloat16)}
    packed = pack(Parcel({}, {"w": tree}))
    assert payload(packed) == nbytes(tree) == 40 + 8 + 6
    assert packed.nbytes == len(packed.note) + sum(map(len, packed.blobs)) > payload(packed)


def test_other_facts_keep_the_tensors() -> None:
    packed = pack(Parcel({"a": 1}, {"w": {"x": torch.ones(2)}}))
    other = with_facts(packed, {"b": 2})
    assert unpack(other).facts == {"b": 2} and other.blobs is packed.blobs


def _pickle() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([{}], dtype=object), allow_pickle=True)  # fmt: skip
    return file.getvalue()


GOOD = pack(Parcel({}, {"w": {"x": torch.ones(4)}}))
WRONG = {
    "no note": (Packed("hello"), "not a note"),
    "another protocol": (Packed(GOOD.note.replace('"protocol": 1', '"protocol": 2'), GOOD.blobs), "protocol 2"),
    "a leaf too many": (Packed(GOOD.note, (*GOOD.blobs, b"")), "2 tensors, but 1 are named"),
    "one name twice": (Packed(json.dumps(json.loads(GOOD.note) | {"leaves": json.loads(GOOD.note)["leaves"] * 2}), GOOD.blobs * 2), "twice"),
    "an unknown dtype": (Packed(GOOD.note.replace("float32", "object"), GOOD.blobs), "dtype 'object'"),
    "a negative size": (Packed(GOOD.note.replace("[4]", "[-4]"), GOOD.blobs), "negative"),
    "another shape": (Packed(GOOD.note.replace("[4]", "[2, 2]"), GOOD.blobs), "another dtype or shape"),
    "a huge shape": (Packed(GOOD.note.replace("[4]", "[1000000000000]"), GOOD.blobs), "bytes for"),
    "cut short": (Packed(GOOD.note, (GOOD.blobs[0][:-1],)), "x: "),
    "not an npy": (Packed(GOOD.note, (b"x" * 100,)), "not a .npy"),
    "a pickle": (Packed(GOOD.note, (_pickle().ljust(100, b"\0"),)), "not a .npy"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_in_our_form_is_refused(what: str) -> None:
    packed, says = WRONG[what]
    with pytest.raises(WireError, match=says):
        unpack(packed)


def test_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="more than 100"):
        unpack(GOOD, limit=100)
    assert unpack(GOOD, limit=GOOD.nbytes).trees["w"]["x"].tolist() == [1, 1, 1, 1]


def test_a_tensor_that_has_no_form_on_the_wire_is_named() -> None:
    with pytest.raises(WireError, match="w: z: a tensor of complex64 does not travel"):
        pack(Parcel({}, {"w": {"z": torch.zeros(1, dtype=torch.complex64)}}))


def test_a_note_says_dtype_and_shape() -> None:
    [found] = leaves(GOOD)
    assert tuple(found) == ("w", "x", "float32", (4,)) and found.nbytes == 16
    assert dataclasses.asdict(Packed("n")) == {"note": "n", "blobs": ()}
