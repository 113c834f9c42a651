"""What each method costs beyond FedAvg: Table 1 of the paper as measurements, one line a method in results/method_costs.jsonl.

    MLLM_FL_DATA=FOLDER python scripts/method_costs.py [--repeats 5] [--method NAME ...]

A client with 620 images of ten classes (CIFAR-10-LT's size, imbalance 100; the images are noise, cost does not depend on them), ResNet-8 of width 16 on 32 x 32
pixels, one local epoch in batches of 32, lr 0.1; the server receives eight such updates. Methods at their defaults. The teacher's logits are cached, as in a run: what
computes them once is not counted. Seconds are processor seconds of one thread, medians over interleaved repeats; FLOP are those of ``torch.utils.flop_counter``, which counts convolutions
and matrix products in forward and backward passes. FedBE, FedDF: 5,000 unlabelled images; ratio loss: 32 labelled images a class.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_fl.algorithms import METHODS, find
from mllm_fl.algorithms.base import Algorithm, Server, Shard, Task, Update
from mllm_fl.atomic import write_atomic
from mllm_fl.conformance.toy import painted
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.runs import environment
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone, nbytes

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "method_costs.jsonl"
CLASSES, IMAGES, ONLINE, CLIENTS, WIDTH, SIZE, SEED = 10, 620, 8, 20, 16, 32, 0
LOCAL = LocalConfig(epochs=1, batch_size=32, lr=0.1)


def world(method: type[Algorithm]) -> tuple[Task, Tree, list[Shard]]:
    """The task with what the method needs, initial weights, and the shards of eight clients in round 2."""
    adapter: dict[str, Any] = {"adapter": "linear", "adapter_dim": 512} if "texts" in method.needs else {}
    net = build_network(ModelConfig(width=WIDTH, **adapter), CLASSES, SEED)
    draws = stream(SEED, "costs")
    labels = np.arange(5000) % CLASSES
    unlabelled = replace(painted(labels, CLASSES, SIZE, name="unlabelled"), labels=np.full(5000, -1, dtype=np.int64))
    texts = torch.nn.functional.normalize(torch.randn(CLASSES, 512, generator=draws), dim=1)
    task = Task(
        net, tuple(map(str, range(CLASSES))), (IMAGES,) * CLIENTS, SEED,
        unlabelled=unlabelled if "unlabelled" in method.needs else None,
        labelled=painted(np.repeat(np.arange(CLASSES), 32), CLASSES, SIZE, name="labelled") if "labelled" in method.needs else None,
        texts=texts if "texts" in method.needs else None,
    )  # fmt: skip
    held = painted(np.arange(IMAGES) % CLASSES, CLASSES, SIZE, name="client")
    logits = torch.randn(IMAGES, CLASSES, generator=draws) if "teacher" in method.needs else None
    return task, clone(net.state_dict()), [Shard(k, 2, held, SEED, logits) for k in range(ONLINE)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of processor time, result): one thread, so that other work on the machine does not count."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


class Bench:
    """One method in its second round, ready to be measured as often as wanted."""

    def __init__(self, name: str) -> None:
        self.name, cls = name, find(name)
        self.method = cls()
        self.task, w, self.shards = world(cls)
        state = self.method.init(self.task, w)
        first = [
            train_client(
                self.task, self.method, self.method.broadcast(state), {}, replace(self.shards[0], round=1), LOCAL
            )[0]
        ]
        self.state = replace(self.server(state, first), round=1)
        self.msg = self.method.broadcast(self.state)
        self.update = self.client()
        self.updates = [self.update._replace(client=k) for k in range(ONLINE)]
        answer = self.method.survey(self.task, self.msg, self.shards[0]) if self.method.concludes else {}
        self.answers = [(k, answer) for k in range(CLIENTS)]
        self.bytes_up = nbytes(self.update.extra) + nbytes(answer)
        self.client_seconds: list[float] = []
        self.server_seconds: list[float] = []

    def client(self) -> Update:
        """One local round, and the survey's answer if the method concludes."""
        update = train_client(self.task, self.method, self.msg, {}, self.shards[0], LOCAL)[0]
        if self.method.concludes:
            self.method.survey(self.task, self.msg, self.shards[0])
        return update

    def server(self, state: Server, updates: list[Update]) -> Server:
        """The server's step, its conclusion if it has one, and what is deployed."""
        state = self.method.server(self.task, state, iter(updates))
        if self.method.concludes and hasattr(self, "answers"):
            state = self.method.conclude(self.task, state, iter(self.answers))
        self.method.deploy(self.task, state)
        return state

    def once(self) -> None:
        """Measure client and server once."""
        self.client_seconds.append(timed(self.client)[0])
        self.server_seconds.append(timed(lambda: self.server(self.state, self.updates))[0])

    def row(self, common: dict[str, Any]) -> dict[str, Any]:
        """The line of results."""
        return {
            "method": self.name, "bytes_up": self.bytes_up,
            "client_seconds": round(statistics.median(self.client_seconds), 4),
            "server_seconds": round(statistics.median(self.server_seconds), 4),
            "client_flop": flop(self.client), "server_flop": flop(lambda: self.server(self.state, self.updates)),
            **common,
        }  # fmt: skip


def flop(work: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def main() -> int:
    p = argparse.ArgumentParser(description="Measure what each method costs beyond FedAvg.")
    p.add_argument("--method", action="append", help="only this method, beside FedAvg (may be repeated)")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, default=OUT)
    args = p.parse_args()
    torch.set_num_threads(1)
    names = list(METHODS) if not args.method else [n for n in METHODS if n == "fedavg" or n in args.method]
    benches = []
    for name in names:
        seconds, bench = timed(lambda name=name: Bench(name))
        print(f"{name}: ready after {seconds:.1f} s", file=sys.stderr)
        benches.append(bench)
    for i in range(args.repeats):
        for bench in benches:
            bench.once()
        print(f"repeat {i + 1} of {args.repeats}", file=sys.stderr)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    about = environment()
    common = {
        "setting": f"ResNet-8 of width {WIDTH} on {SIZE} x {SIZE} pixels, {CLASSES} classes, {IMAGES} images a client, one local epoch"
        f" in batches of {LOCAL.batch_size}, {ONLINE} updates of {CLIENTS} clients, methods at their defaults",
        "repeats": args.repeats, "seed": SEED, "processor": about["processor"], "torch": about["torch"],
        "load": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip(),
    }  # fmt: skip
    write_atomic(args.out, "".join(json.dumps(b.row(common)) + "\n" for b in benches).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
