"""Objects on the way to a worker and back: every number arrives, contiguous, in memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm_fl.engines import channel

LEAVES = {
    "float32": torch.arange(6.0).view(2, 3) / 7,
    "float64": torch.tensor([1 / 3, -0.0, float("inf")], dtype=torch.float64),
    "bfloat16": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
    "float16": torch.tensor([0.1], dtype=torch.float16),
    "int64": torch.tensor(1 << 40),
    "uint8": torch.arange(100, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "wants a gradient": torch.ones(2, requires_grad=True),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_tensor_arrives_with_its_numbers_dtype_and_shape(name: str) -> None:
    """Another lies before it and another behind it, of sizes that are no multiple of the 64 bytes that each begins at."""
    sent = {"before": torch.ones(5), "it": LEAVES[name], "behind": torch.arange(3)}
    data = bytearray(channel.pack(sent)[0])
    got = channel.unpack(data)
    data[:] = bytes(len(data))  # nothing that arrived lies in the message any more
    it, was = got["it"], LEAVES[name].detach()
    assert (it.dtype, it.shape, it.is_contiguous(), it.requires_grad) == (was.dtype, was.shape, True, False)
    assert torch.equal(it.view(-1).view(torch.uint8), was.contiguous().view(-1).view(torch.uint8))
    assert torch.equal(got["before"], torch.ones(5)) and torch.equal(got["behind"], torch.arange(3))


def test_a_parameter_is_one_again_and_no_leaf_shares_memory_with_another() -> None:
    got = channel.unpack(bytearray(channel.pack([nn.Parameter(torch.ones(3)), torch.zeros(3)])[0]))
    assert isinstance(got[0], nn.Parameter) and got[0].requires_grad
    assert got[0].untyped_storage().data_ptr() != got[1].untyped_storage().data_ptr()
    assert got[1].untyped_storage().nbytes() == 12
