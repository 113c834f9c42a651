"""What the serial engine costs beside a bare training loop: the same clients, batches and steps, interleaved, medians.

    make bench                                            (or .venv/bin/python benchmarks/serial.py --repeats 9)

Both sides train the same ResNet-8 on synthetic images of CIFAR's shape, one thread, without augmentation. The bare loop is what
one would write by hand with torch alone. Before anything is timed, both must have ended with the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mllm_fl.algorithms.base import Broadcast, FedAvg, Shard, Task
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.serial import SerialEngine
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.runs import environment
from mllm_fl.seeds import numpy_stream, stream
from mllm_fl.trees import Tree, clone

NAMES = tuple(f"class {c}" for c in range(10))


def synthetic(clients: int, images: int, size: int = 32) -> list[ImageSet]:
    """``clients`` sets of ``images`` random images (3, size, size) with random labels of ten classes."""
    sets = []
    for k in range(clients):
        rng = numpy_stream(0, "benchmark", k)
        pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8))
        sets.append(ImageSet(f"client {k}", MemoryPixels(pixels), rng.integers(0, 10, images), NAMES))
    return sets


def bare(net: Network, start: Tree, shards: Sequence[Shard], local: LocalConfig) -> list[Tree]:
    """Each client's weights after local SGD, written with torch and nothing of ours but the shuffling stream."""
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


def engine(task: Task, start: Tree, shards: Sequence[Shard], local: LocalConfig) -> list[Tree]:
    """The same through the serial engine and FedAvg's hooks."""
    serial = SerialEngine(EngineConfig(), task, FedAvg(), local)
    return [reply.update.w for reply in serial.clients(Broadcast(start, {}), shards, {})]


def main(argv: list[str] | None = None) -> None:
    """Prints a line a repetition and, last, one JSON object, which is also appended to ``--out``."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clients", type=int, default=2)
    p.add_argument("--images", type=int, default=300, help="of each client")
    p.add_argument("--width", type=int, default=16, help="channels of the first stage")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("results/bench.jsonl"), help="gets one line more")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    local = LocalConfig(epochs=1, batch_size=32, augment="none")
    net = build_network(ModelConfig(width=args.width), 10, 0)
    start = clone(net.state_dict())
    shards = [Shard(k, 1, images, 0) for k, images in enumerate(synthetic(args.clients, args.images))]
    task = Task(net, NAMES, tuple(map(len, shards)), 0)

    pairs = zip(bare(net, start, shards, local), engine(task, start, shards, local), strict=True)
    apart = max(float((a[k].double() - b[k].double()).abs().max()) for a, b in pairs for k in a)
    if apart > 1e-5:  # the same sums in the same order; anything beyond rounding means that different work was done
        raise SystemExit(f"the two loops disagree by {apart:.1e}; nothing was timed")

    seconds: dict[str, list[float]] = {"bare": [], "engine": []}
    for i in range(args.repeats):
        for name in ("bare", "engine") if i % 2 == 0 else ("engine", "bare"):
            began = time.perf_counter()
            if name == "bare":
                bare(net, start, shards, local)
            else:
                engine(task, start, shards, local)
            seconds[name].append(time.perf_counter() - began)
        print(f"{i + 1}/{args.repeats}: bare {seconds['bare'][-1]:.3f} s, engine {seconds['engine'][-1]:.3f} s")
    trained = args.clients * args.images
    median = {name: statistics.median(s) for name, s in seconds.items()}
    where = environment()
    said = {
        "benchmark": "serial engine over bare loop",
        "seconds": {name: round(s, 4) for name, s in median.items()},
        "images_per_second": {name: round(trained / s, 1) for name, s in median.items()},
        "engine_over_bare": round(median["engine"] / median["bare"], 4),
        "ratios": [round(e / b, 4) for b, e in zip(seconds["bare"], seconds["engine"], strict=True)],
        "largest_difference_of_weights": apart, "repeats": args.repeats, "clients": args.clients, "images": args.images,
        "width": args.width, "torch": where["torch"], "processor": where["processor"], "cores": where["cores"], "commit": where["commit"],
    }  # fmt: skip
    print(json.dumps(said))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
