"""What was tried to make a client's step faster, measured again: the numbers of docs/engines.md, "Tried".

    python -m benchmarks.tried compile | malloc | evaluation | threads | overlap | memory   [--width 16] [--preload libjemalloc.so.2]

Processor time of one thread, medians of interleaved repetitions; synthetic images of CIFAR's shape, batch 32.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mllm_fl.algorithms.base import Broadcast, FedAvg, Task
from mllm_fl.data.longtail import long_tail
from mllm_fl.data.partition import partition
from mllm_fl.engines.bench import Load
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.parallel import ParallelEngine
from mllm_fl.engines.process import ENVIRONMENT
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone, digest

NAMES = tuple(map(str, range(10)))


def stepper(
    net: Network, precision: str = "bf16", layout: str = "channels_last", images: int = 32
) -> Callable[[], Tree]:
    """A call that takes one step of SGD from where the last one ended, and returns the weights."""
    task = Task(
        net, NAMES, (images,), 0,
        precision="bf16" if precision == "bf16" else "fp32", channels_last=layout == "channels_last",
    )  # fmt: skip
    form = torch.channels_last if task.channels_last else torch.contiguous_format
    w = {k: v.clone(memory_format=form) if v.dim() == 4 else v.clone() for k, v in net.state_dict().items()}
    leaves = [w[k].requires_grad_(True) for k in task.trainable]
    optimiser = torch.optim.SGD(leaves, lr=0.01)
    x, y = torch.randn(images, 3, 32, 32, generator=stream(0, "tried")), torch.arange(images) % 10

    def step() -> Tree:
        for leaf, g in zip(leaves, torch.autograd.grad(F.cross_entropy(task.forward(w, x)[1], y), leaves), strict=True):
            leaf.grad = g
        optimiser.step()
        return w

    return step


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of processor time of each call, interleaved; each has been called before."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            at = time.thread_time()
            call()
            found[name].append(1e3 * (time.thread_time() - at))
    return {name: round(statistics.median(v), 1) for name, v in found.items()}


def compiled(width: int) -> dict[str, object]:
    """Inductor's fused BatchNorm and ReLU beside eager steps; ``first``: seconds until the first compiled step is done."""
    net = build_network(ModelConfig(width=width), 10, 0)
    fused = copy.deepcopy(net)
    fused.compile()
    calls: dict[str, Callable[[], object]] = {"eager": stepper(net), "compiled": stepper(fused)}
    at = time.process_time()
    calls["compiled"]()
    first = round(time.process_time() - at, 1)
    for call in calls.values():
        call()
    return {"milliseconds": medians(calls, 25), "first": first}


def malloc(width: int, preload: str = "") -> dict[str, object]:
    """A fresh process with glibc's defaults beside one with the workers' settings and one with the allocator ``preload``, taking turns."""
    code = (
        "import json; from benchmarks.tried import *; torch.set_num_threads(1); "
        f"net = build_network(ModelConfig(width={width}), 10, 0); "
        "calls = {'fp32 nchw': stepper(net, 'fp32', 'nchw'), 'bf16 channels_last': stepper(net)}; "
        "[c() for c in calls.values() for _ in range(3)]; print(json.dumps(medians(calls, 20)))"
    )
    kinds = {"default": {"OMP_NUM_THREADS": "1"}, "raised": ENVIRONMENT}
    if preload:
        kinds["preloaded"] = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": preload}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(3):
        for name in found:
            env = os.environ | kinds[name]
            said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
            found[name].append(json.loads(said.stdout))
    return {n: {k: round(statistics.median(one[k] for one in v), 1) for k in v[0]} for n, v in found.items()}


def evaluation(width: int) -> dict[str, object]:
    """1,000 test images in batches of several sizes."""
    net = build_network(ModelConfig(width=width), 10, 0)
    w, x = clone(net.state_dict()), torch.randn(1000, 3, 32, 32, generator=stream(0, "tried"))
    found: dict[str, object] = {}
    for precision in ("fp32", "bf16"):
        task = Task(net, NAMES, (1,), 0, precision=precision, channels_last=precision == "bf16")  # type: ignore[arg-type]

        def through(size: int, task: Task = task) -> None:
            with torch.no_grad():
                for part in x.split(size):
                    task.forward(w, part, train=False)

        through(100)
        calls: dict[str, Callable[[], object]] = {str(n): lambda n=n: through(n) for n in (50, 100, 250, 500)}  # type: ignore[misc]
        found[precision] = medians(calls, 4)
    return found


def threads(width: int) -> dict[str, object]:
    """The first digits of the weights' digest after two steps, by number of threads: other threads, other bits."""
    found: dict[str, object] = {}
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        step = stepper(build_network(ModelConfig(width=width), 10, 0), "fp32", "nchw")
        step()
        found[str(n)] = digest(step())[:8]
    return found


def overlap(width: int) -> dict[str, object]:
    """What testing the last model beside the next round's clients gains at the most: the share of a round in which workers would else be idle.

    CIFAR-10-LT (imbalance 100) on 20 clients (alpha 0.5; CReFF's equal ones, and Dirichlet's unequal ones), eight a round over 200 rounds, one
    epoch, 10,000 test images; the largest job is begun first and each worker takes the next. What a trained and a tested image cost
    is timed here; the rest is arithmetic.
    """
    kept = long_tail(np.repeat(np.arange(10), 5000), 10, 100, 0)
    net = build_network(ModelConfig(width=width), 10, 0)
    task = Task(net, NAMES, (1,), 0, precision="bf16", channels_last=True)
    w, x = clone(net.state_dict()), torch.randn(100, 3, 32, 32, generator=stream(0, "tried"))

    def tested() -> None:
        with torch.no_grad():
            task.forward(w, x, train=False)

    calls: dict[str, Callable[[], object]] = {"trained": stepper(net), "tested": tested}
    for call in calls.values():
        call()
    cost = {name: ms / (32 if name == "trained" else 100) for name, ms in medians(calls, 10).items()}
    found: dict[str, object] = {"milliseconds an image": {k: round(v, 3) for k, v in cost.items()}}
    for how in ("creff", "dirichlet"):
        sizes = [len(k) for k in partition(kept, how=how, clients=20, alpha=0.5, seed=0, min_size=1)]
        rng = np.random.default_rng(0)
        rounds = [[sizes[k] * cost["trained"] for k in rng.choice(20, 8, replace=False)] for _ in range(200)]
        for workers in (2, 3, 4):
            tests = [cost["tested"] * 10_000 / (4 * workers)] * (4 * workers)
            apart = sum(makespan(jobs, workers) + makespan(tests, workers) for jobs in rounds)
            together = sum(makespan([*jobs, *tests], workers) for jobs in rounds)
            found[f"gained, {how}, {workers} workers"] = round(1 - together / apart, 4)
    return found


def memory(width: int) -> dict[str, object]:
    """Megabytes (PSS) of the parent and of two workers by what they are: after importing, after clients trained, after 1,000 images were tested."""
    load, net = Load(width=width), build_network(ModelConfig(width=width), 10, 0)
    task, w = Task(net, NAMES, (96,) * 4, 0, precision="bf16", channels_last=True), clone(net.state_dict())
    found: dict[str, object] = {}
    with ParallelEngine(EngineConfig(workers=2), task, FedAvg(), load.local) as engine:
        engine.prove()
        list(engine.survey(Broadcast(w, {}), load.shards(4, 8)))  # both workers have begun
        steps: dict[str, Callable[[], object]] = {
            "imported": lambda: None,
            "trained": lambda: list(engine.clients(Broadcast(w, {}), load.shards(4, 96), {})),
            "tested": lambda: engine.evaluate(w, load.shard(4, 1000).images),
        }
        for name, step in steps.items():
            step()
            for who, pid in zip(("parent", "worker 1", "worker 2"), (os.getpid(), *engine.pool.pids()), strict=True):
                found[f"{name}: {who}"] = by_kind(pid)
    return found


def by_kind(pid: int) -> dict[str, int]:
    """Megabytes of a process (PSS): what it allocated, files and libraries mapped, images that all processes share. Linux alone."""
    found, kind = {"allocated": 0, "libraries": 0, "shared images": 0}, "allocated"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
            kind = "shared images" if "memfd" in name else "libraries" if name.startswith("/") else "allocated"
        elif words[0] == "Pss:":
            found[kind] += int(words[1])
    return {kind: round(kb / 1000) for kind, kb in found.items()}


def makespan(jobs: Sequence[float], workers: int) -> float:
    """When the last job ends if the largest is begun first and each worker takes the next when it is free."""
    free = [0.0] * workers
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def main() -> None:
    """Print one JSON object."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tried = {
        "compile": compiled,
        "malloc": malloc,
        "evaluation": evaluation,
        "threads": threads,
        "overlap": overlap,
        "memory": memory,
    }
    p.add_argument("what", choices=tried)
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--preload", default="", help="another allocator's library, for malloc")
    args = p.parse_args()
    torch.set_num_threads(1)
    more = {"preload": args.preload} if args.what == "malloc" else {}
    print(json.dumps({"tried": args.what, "width": args.width, **tried[args.what](args.width, **more)}), flush=True)


if __name__ == "__main__":
    main()
