"""What is fastest on this chip: precision and layout of a network's passes, measured for a second or two, never believed.

bf16 halves a step where the chip multiplies it (AVX-512 BF16, AMX) and makes it several times slower where it is emulated; channels-last
gains a tenth or a half. Neither follows from the chip's name, so both are timed on the network at hand. The answer is kept in the
user's cache folder, by chip, torch and network; ``MLLM_FL_PROBE=off`` answers "fp32, nchw" without measuring.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm_fl.algorithms.base import Task
from mllm_fl.engines.checkpoint import write_atomic
from mllm_fl.engines.config import EngineConfig
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone

PLAIN = {"precision": "fp32", "layout": "nchw"}
"""What every chip does the same way; anything else has to be faster by ``WORTH``."""
WORTH = 0.03
BUDGET = 2.5  # seconds
CHOICES = [(p, form) for p in ("fp32", "bf16") for form in ("nchw", "channels_last")]


def chosen(config: EngineConfig, net: nn.Module, side: int, batch: int, begun: Mapping[str, Any]) -> EngineConfig:
    """``config`` with every "auto" decided: as the run was ``begun`` (its env.json's "engine"), else by measuring ``net`` here.

    ``side``: pixels a side of the images; ``batch``: images a step.
    """
    keys = [key for key in PLAIN if getattr(config, key) == "auto"]
    decided = {key: begun[key] for key in keys if key in begun}
    missing = [key for key in keys if key not in decided]
    if missing:
        found = PLAIN
        if config.name != "batched" and os.environ.get("MLLM_FL_PROBE") != "off":
            found = PLAIN | fastest(probed(net, side, batch), config)
        decided |= {key: found[key] for key in missing}
    return dataclasses.replace(config, **decided)


def fastest(seconds: Mapping[str, float], config: EngineConfig) -> dict[str, str]:
    """The quickest choice among those that the configuration leaves open; the plainest unless another gains ``WORTH``."""
    allowed = [(p, form) for p, form in CHOICES if config.precision in ("auto", p) and config.layout in ("auto", form)]
    best = allowed[0] if allowed else ("fp32", "nchw" if config.layout == "auto" else config.layout)
    for choice in allowed[1:]:
        if seconds.get("/".join(choice), float("inf")) < (1 - WORTH) * seconds.get("/".join(best), float("inf")):
            best = choice
    return dict(zip(("precision", "layout"), best, strict=True))


def probed(net: nn.Module, side: int, batch: int, cache: Path | None = None) -> dict[str, float]:
    """Seconds of processor time for a step's passes, by "precision/layout"; from the cache when they are there."""
    shapes = [(k, tuple(v.shape)) for k, v in net.state_dict().items()]
    what = {"chip": _chip(), "torch": torch.__version__, "net": repr(shapes), "side": side, "batch": batch}
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache or _cache_folder()) / f"probe-{name}.json"
    try:
        found: dict[str, float] = json.loads(path.read_text())["seconds"]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measured(net, side, batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(what | {"net": len(shapes), "seconds": found}, indent=1).encode())
    except OSError:
        pass  # nowhere to keep it: measured again next time
    return found


def measured(net: nn.Module, side: int, batch: int, budget: float = BUDGET) -> dict[str, float]:
    """Median seconds of processor time of one thread for forward and backward passes, by "precision/layout".

    Few images a step when they are large; a choice twice as slow as another is dropped at once.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.thread_time()
        w = clone(net.state_dict())
        one = _step(net, w, "fp32", "nchw", torch.zeros(2, 3, side, side))  # the first step also pays for start-up
        one = min(one, _step(net, w, "fp32", "nchw", torch.zeros(2, 3, side, side)))
        images = int(min(batch, max(2, 2 * budget / 16 / max(one, 1e-6))))
        x = torch.randn(images, 3, side, side, generator=stream(0, "probe"))
        timed: dict[tuple[str, str], list[float]] = {}
        best = float("inf")
        for choice in CHOICES:
            first = _step(net, w, *choice, x)
            if first < 3 * best:
                timed[choice] = []
                best = min(best, first)
        while not all(timed.values()) or time.thread_time() - began < 0.8 * budget:
            for choice, seconds in timed.items():
                seconds.append(_step(net, w, *choice, x))
            slow = min(min(s) for s in timed.values())
            timed = {c: s for c, s in timed.items() if min(s) < 2 * slow}
            if min(map(len, timed.values())) >= 15:
                break
        return {"/".join(choice): statistics.median(seconds) for choice, seconds in timed.items()}
    finally:
        torch.set_num_threads(threads)


def _step(net: nn.Module, w: Tree, precision: str, layout: str, x: torch.Tensor) -> float:
    task = Task(
        net, (), (), 0,
        precision="bf16" if precision == "bf16" else "fp32", channels_last=layout == "channels_last",
    )  # fmt: skip
    form = torch.channels_last if task.channels_last else torch.contiguous_format
    w = {k: v.clone(memory_format=form) if v.dim() == 4 else v.clone() for k, v in w.items()}
    leaves = [w[k].requires_grad_(True) for k in task.trainable]
    start = time.thread_time()
    loss = task.forward(w, x)[1].square().mean()
    torch.autograd.grad(loss, leaves, allow_unused=True)
    return time.thread_time() - start


def _chip() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(next((x for x in lines if x.startswith(key)), "") for key in ("model name", "flags"))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-fl"
