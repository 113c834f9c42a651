"""One federated round, timed: a bare training loop beside this library's engines, interleaved, on synthetic images of CIFAR's shape.

The bare loop is what one would write by hand with torch alone (fp32, NCHW, one thread, no augmentation); its seconds divided by the
cores are what a process per core could reach at best, and all ratios refer to that. Before anything is timed the serial engine
must have ended with the bare loop's weights, and the parallel engine with the serial one's bytes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Server, Shard, Task
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.cores import usable_cores
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.meter import Footprint
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.seeds import numpy_stream, stream
from mllm_fl.trees import Tree, clone, digest

NAMES = tuple(f"class {c}" for c in range(10))


@dataclass(frozen=True)
class Load:
    """What a round is: ``clients`` times ``images`` images (3, 32, 32) for ``epochs``, ResNet-8 of ``width``; ``tiny`` clients of eight images."""

    clients: int = 8
    images: int = 600
    epochs: int = 1
    width: int = 64
    batch: int = 32
    repeats: int = 3
    tiny: int = 1000

    def shard(self, k: int, images: int) -> Shard:
        """Client ``k``: ``images`` random images with random labels of ten classes; no two clients alike."""
        rng = numpy_stream(0, "benchmark", k)
        pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8))
        return Shard(k, 1, ImageSet(f"client {k}", MemoryPixels(pixels), rng.integers(0, 10, images), NAMES), 0)

    def shards(self, count: int, images: int) -> list[Shard]:
        """Clients 0 to ``count``."""
        return [self.shard(k, images) for k in range(count)]

    @property
    def local(self) -> LocalConfig:
        """The clients' training."""
        return LocalConfig(epochs=self.epochs, batch_size=self.batch, lr=0.1, augment="none")


QUICK = Load(clients=4, images=96, repeats=3, tiny=200)


def bare(net: Network, start: Tree, shards: Sequence[Shard], local: LocalConfig) -> list[Tree]:
    """Each client's weights after local SGD, with torch and nothing of ours but the shuffling stream."""
    ended = []
    for shard in shards:
        net.load_state_dict(start)
        net.train()
        optimiser = torch.optim.SGD(net.parameters(), lr=local.lr)
        shuffle, x, y = stream(shard.seed, "shuffle", shard.round, shard.client), shard.x(range(len(shard))), shard.y
        for _ in range(local.epochs):
            for batch in torch.split(torch.randperm(len(y), generator=shuffle), local.batch_size):
                optimiser.zero_grad()
                F.cross_entropy(net(x[batch])[1], y[batch]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        ended.append(clone(net.state_dict()))
    return ended


def chip_limit(seconds: float = 1.0) -> dict[str, float]:
    """GFLOP/s that one thread reaches in a matrix product of 1024 x 1024, by precision: the best of many."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(1024, 1024, generator=stream(0, "benchmark")).to(dtype)
        b, best, began = a.T.contiguous(), float("inf"), time.perf_counter()
        while time.perf_counter() - began < seconds / 2:
            at = time.thread_time()
            torch.mm(a, b)
            best = min(best, time.thread_time() - at)
        found[name] = round(2 * 1024**3 / best / 1e9, 1)
    return found


def measure(load: Load, progress: Progress = silent) -> dict[str, Any]:
    """All numbers of one benchmark, ready for a line of results/bench.jsonl.

    Raises:
        UserError: the loops did not do the same work; nothing is timed then.
    """
    from mllm_fl.engines.parallel import ParallelEngine
    from mllm_fl.engines.probe import chosen
    from mllm_fl.engines.serial import SerialEngine

    torch.set_num_threads(1)
    cores = usable_cores()
    net = build_network(ModelConfig(width=load.width), 10, 0)
    start, shards, local = clone(net.state_dict()), load.shards(load.clients, load.images), load.local
    plain = Task(net, NAMES, tuple(map(len, shards)), 0)
    best = chosen(EngineConfig(), net, 32, load.batch, {})
    quick = replace(
        plain, precision="bf16" if best.precision == "bf16" else "fp32", channels_last=best.layout == "channels_last"
    )
    method = FedAvg()
    config = EngineConfig(workers=cores)
    with ExitStack() as stack:
        rooms = {
            "parallel fp32": footprint(plain, load),
            (name := f"parallel {best.precision} {best.layout}"): footprint(quick, load),
        }
        began = time.perf_counter()
        fast = ParallelEngine(config, quick, method, local)
        stack.enter_context(fast).prove()
        startup = time.perf_counter() - began
        same = stack.enter_context(ParallelEngine(config, plain, method, local, pool=fast.pool))
        serial = SerialEngine(config, plain, method, local)
        few = [replace(s, images=s.images.subset(range(min(len(s), 2 * load.batch)))) for s in shards[:2]]
        apart = _check(net, start, few, local, serial, same)
        rounds: dict[str, Callable[[], Any]] = {
            "bare": lambda: method.server(plain, Server(start), _updates(bare(net, start, shards, local), shards)),
            "serial fp32": lambda: _round(serial, method, plain, start, shards),
            "parallel fp32": lambda: _round(same, method, plain, start, shards),
            name: lambda: _round(fast, method, quick, start, shards),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rounds}
        used: dict[str, list[float]] = {name: [] for name in rounds}
        busy = []
        for i in range(load.repeats):
            for one in list(rounds) if i % 2 == 0 else list(rounds)[::-1]:
                progress(Event("bench", i, load.repeats, one))
                before, at, cpu = list(fast.pool.busy), time.perf_counter(), _cpu_seconds(fast.pool.pids())
                rounds[one]()
                seconds[one].append(time.perf_counter() - at)
                used[one].append(_cpu_seconds(fast.pool.pids()) - cpu)
                if one == name:
                    busy.append(max(b - a for a, b in zip(before, fast.pool.busy, strict=True)))
        over = 1 - statistics.median(b / s for b, s in zip(busy, seconds[name], strict=True))
        progress(Event("bench", load.repeats, load.repeats, f"{load.tiny} tiny clients"))
        tiny = _tiny(load, fast.pool)
    flops = 3 * 2 * _multiply_adds(net) * load.clients * load.images * load.epochs
    limit = chip_limit()
    return {
        "benchmark": "engines",
        "load": vars(load) | {},
        "cores": cores,
        "seconds": {n: [round(s, 3) for s in v] for n, v in seconds.items()},
        "core_seconds": {n: [round(s, 3) for s in v] for n, v in used.items()},
        "over_bare_shared": {n: _ratio(used[n], used["bare"], 1) for n in rounds},
        "wall_over_bare_shared": {n: _ratio(seconds[n], seconds["bare"], cores) for n in rounds},
        "largest_difference_of_weights": apart,
        "overhead": {"clients": load.clients, "share": round(over, 4)},
        "overhead_tiny": {"clients": load.tiny, "share": round(tiny, 4)},
        "startup_seconds": round(startup, 2),
        "pss_bytes": rooms[name]["together"] if rooms[name] else None,
        "pss_parts": rooms,
        "gflops_a_core": limit,
        "limit_seconds": {p: round(flops / (g * 1e9 * cores), 3) for p, g in limit.items()},
    }


def _round(engine: Any, method: Algorithm, task: Task, w: Tree, shards: Sequence[Shard]) -> Server:
    return method.server(task, Server(w), (r.update for r in engine.clients(Broadcast(w, {}), shards, {})))


def _updates(ended: Sequence[Tree], shards: Sequence[Shard]) -> Iterator[Any]:
    from mllm_fl.algorithms.base import Update

    for w, shard in zip(ended, shards, strict=True):
        yield Update(shard.client, w, float(len(shard)), {}, {})


def footprint(task: Task, load: Load) -> dict[str, Any]:
    """The most memory (:class:`mllm_fl.engines.meter.Footprint`) of an engine of its own while it trains a few clients and tests 1,000 images.

    Before anything else has run in these processes: what they allocate once they keep. {} where the system does not tell.
    """
    from mllm_fl.engines.parallel import ParallelEngine

    few = load.shards(2 * usable_cores(), min(load.images, 4 * load.batch))
    w = clone(task.net.state_dict())
    with ParallelEngine(EngineConfig(workers=usable_cores()), task, FedAvg(), load.local) as engine:
        engine.prove()
        with Footprint(lambda: [os.getpid(), *engine.pool.pids()]) as found:
            _round(engine, FedAvg(), task, w, few)
            engine.evaluate(w, load.shard(-1, 1000).images)
    return {"together": found.together, "parent": found.each[0], "workers": found.each[1:]} if found.together else {}


def _check(net: Network, w: Tree, shards: Sequence[Shard], local: LocalConfig, serial: Any, parallel: Any) -> float:
    """How far the serial engine's weights are from the bare loop's; the parallel engine's must be the serial one's."""
    ours = [r.update.w for r in serial.clients(Broadcast(w, {}), shards, {})]
    theirs = [r.update.w for r in parallel.clients(Broadcast(w, {}), shards, {})]
    if list(map(digest, ours)) != list(map(digest, theirs)):
        raise UserError("mllm-fl bench", "the parallel engine's weights are not the serial engine's; nothing was timed")
    pairs = zip(bare(net, w, shards, local), ours, strict=True)
    apart = max(float((a[k].double() - b[k].double()).abs().max()) for a, b in pairs for k in a)
    if apart > 1e-5:  # the same sums in the same order; anything beyond rounding is other work
        raise UserError("mllm-fl bench", f"the loops disagree by {apart:.1e}; nothing was timed")
    return apart


def _tiny(load: Load, pool: Any) -> float:
    """The share of a round with many tiny clients (ResNet-8 of width 16, one batch) in which the busiest worker computes nothing."""
    from mllm_fl.engines.parallel import ParallelEngine

    net = build_network(ModelConfig(width=16), 10, 0)
    w, shards = clone(net.state_dict()), load.shards(load.tiny, 8)
    task = Task(net, NAMES, tuple(map(len, shards)), 0)
    with ParallelEngine(EngineConfig(), task, FedAvg(), load.local, pool=pool) as engine:
        _round(engine, FedAvg(), task, w, shards[:50])
        before, at = list(pool.busy), time.perf_counter()
        _round(engine, FedAvg(), task, w, shards)
        wall = time.perf_counter() - at
        return 1 - float(max(b - a for a, b in zip(before, pool.busy, strict=True))) / wall


def _ratio(ours: Sequence[float], bare: Sequence[float], cores: int) -> float:
    """Median of the ratios to the bare loop's seconds, shared between ``cores``, repetition by repetition."""
    return round(statistics.median(a * cores / b for a, b in zip(ours, bare, strict=True)), 3)


def _multiply_adds(net: Network) -> int:
    """Of one forward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32))
    return int(counter.get_total_flops()) // 2


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of this process and of the workers, where the system tells."""
    total = time.process_time()
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return total
