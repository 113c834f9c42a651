"""What is looked at before training, as far as possible before a weight is loaded: one sample as tokens, what memory it will take, one batch overfitted.

The memory's parts are counted, not guessed, where that needs no weights: the frozen model and the compact one are built without storage,
and what automatic differentiation keeps of one pass through the language model is added up from what it asks to keep.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.network import Network
from mllm_fl.models.teacher.llava import Blueprint

BF16, FP32 = 2, 4  # bytes


def kept_bytes(call: Callable[[], Any], frozen: nn.Module) -> int:
    """Bytes that automatic differentiation keeps of ``call``, each storage once, without the weights of ``frozen``. Works without storage."""
    weights = {p.untyped_storage()._cdata for p in [*frozen.parameters(), *frozen.buffers()]}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s._cdata not in weights:
            found[s._cdata] = (s.nbytes(), t)  # held, so that no other storage takes its number
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = call()
    total = sum(n for n, _ in found.values())
    del kept
    return total


def estimate(
    plan: Blueprint, network: Network, *, side: int, share: int, part: int, tokens: int, predicted: int, half: bool, checkpointing: bool,
    skip_lm: bool = False, processes: int = 1, shard: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Peak memory in bytes, by part and in ``total``, of one process that trains ``share`` samples a step, ``part`` of them at a time.

    ``tokens``: the longest conversation; ``predicted``: the most positions at its end for which logits are formed.

    "frozen weights"; "compact model" (weights, gradients, two moments in fp32, and what its pass keeps); "language model" (what its pass
    keeps; with ``checkpointing`` the layers' inputs and one layer's inner values); "logits" (in the frozen precision, in fp32, their gradient and
    the softmax: 4 + 4 + 4 bytes and the precision's own, times positions times vocabulary). The allocator's own overhead is not in it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    width, dtype = (BF16, torch.bfloat16) if half else (FP32, torch.float32)
    fake = FakeTensorMode()  # tensors have shapes and no storage; not "meta", which masks cannot be made on
    with fake:
        model = plan.skeleton(dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    text = plan.config.get_text_config()
    student = copy.deepcopy(network).to("meta")
    own = kept_bytes(lambda: student.tokens(torch.empty(2, 3, side, side, device="meta"), plan.grid), student)
    parameters = sum(p.numel() for p in student.parameters())
    out = {
        "frozen weights": weights // processes if shard else weights,
        "compact model": parameters * 4 * FP32 + own * share // 2 + 2 * share * plan.grid**2 * plan.width * FP32,
    }
    if not skip_lm:
        inner: Any = model.get_submodule("model")
        decoder = getattr(inner, "language_model", None) or inner.text_model
        with fake:
            x = torch.empty(1, tokens, text.hidden_size, dtype=dtype, requires_grad=True)
            kept = kept_bytes(lambda: decoder(inputs_embeds=x, use_cache=False), model)
        layers = int(text.num_hidden_layers)
        if checkpointing:
            kept = layers * tokens * int(text.hidden_size) * width + math.ceil(kept / layers)
        out["language model"] = kept * part
        out["logits"] = part * predicted * int(text.vocab_size) * (3 * FP32 + width)
    out["total"] = sum(out.values())
    return out


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since :func:`forget_peak` (Linux; 0 elsewhere)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    key = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def forget_peak(device: torch.device) -> None:
    """Begin to measure the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed here: the peak is then that of the whole process so far
        pass


def peak_bytes(device: torch.device, before: int) -> int:
    """The measured peak: of the allocator on a GPU, on a CPU of the process over what it took ``before``."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return max(resident(peak=True) - before, 0)


def overfitted(losses: list[float]) -> dict[str, Any]:
    """The record of an overfitted batch.

    Raises:
        UserError: its loss did not fall.
    """
    if not losses[-1] < losses[0]:
        raise UserError(
            "pretrain.overfit",
            f"the loss on one batch went from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps",
            "lower pretrain.lr, or look at the sample in preflight.json",
        )
    return {"steps": len(losses), "first": losses[0], "last": losses[-1]}
