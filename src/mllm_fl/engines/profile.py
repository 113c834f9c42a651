"""Where a client's round goes, by part: `mllm-fl bench --profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Server, Shard, Task
from mllm_fl.engines.bench import NAMES, Load
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.trees import Tree, clone


def profile(load: Load) -> dict[str, dict[str, float]]:
    """Seconds of processor time by part of one client's round, of aggregating two and of testing 1,000 images; fp32 NCHW and the probe's choice."""
    from mllm_fl.engines.evaluate import evaluate
    from mllm_fl.engines.probe import chosen

    torch.set_num_threads(1)
    net = build_network(ModelConfig(width=load.width), 10, 0)
    w, [shard] = clone(net.state_dict()), load.shards(1, load.images)
    [test] = load.shards(1, 1000)
    best = chosen(EngineConfig(), net, 32, load.batch, {})
    found = {}
    for name in ("fp32 nchw", f"{best.precision} {best.layout}"):
        task = Task(
            net, NAMES, (len(shard),), 0,
            precision="bf16" if "bf16" in name else "fp32", channels_last="channels_last" in name,
        )  # fmt: skip
        parts: dict[str, float] = {}
        for _ in range(2):  # the first also pays for what happens once
            parts = _parts(task, w, shard, load.local)
        at = time.thread_time()
        evaluate(task, w, test.images)
        parts["evaluation of 1,000 images"] = time.thread_time() - at
        found[name] = {k: round(v, 4) for k, v in parts.items()}
    return found


class _Timed(Algorithm):
    """FedAvg whose forward pass is timed."""

    spent = 0.0

    def objective(self, *args: Any) -> torch.Tensor:
        at = time.thread_time()
        loss = super().objective(*args)
        _Timed.spent += time.thread_time() - at
        return loss


def _parts(task: Task, w: Tree, shard: Shard, config: LocalConfig) -> dict[str, float]:
    """One client and one aggregation, taken apart."""
    from mllm_fl.engines import local

    spent = {"data": 0.0, "backward": 0.0, "optimiser": 0.0}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            at = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += time.thread_time() - at

        return wrapped

    _Timed.spent = 0.0
    at = time.thread_time()
    crop = replace(config, augment="crop-flip")
    with (
        patch.object(local, "augmented", timed("data", local.augmented)),
        patch.object(Shard, "x", timed("data", Shard.x)),
        patch.object(torch.autograd, "grad", timed("backward", torch.autograd.grad)),
        patch.object(torch.optim.SGD, "step", timed("optimiser", torch.optim.SGD.step)),
    ):
        update, _ = local.train_client(task, _Timed(), Broadcast(w, {}), {}, shard, crop)
    whole = time.thread_time() - at
    parts = {"data": spent["data"], "forward": _Timed.spent} | {k: spent[k] for k in ("backward", "optimiser")}
    parts["rest"] = whole - sum(parts.values())
    at = time.thread_time()
    FedAvg().server(task, Server(w), [update, update])
    return parts | {"aggregation of two": time.thread_time() - at}
