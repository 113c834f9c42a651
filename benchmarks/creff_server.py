"""What a round costs CReFF's server, fused and as one would first write it: interleaved, medians, one thread, the processor's seconds.

    .venv/bin/python -m benchmarks.creff_server                       (ten classes; minutes with --classes 100)

Timed is all of the server's part at the authors' numbers (100 features a class of width 256, 100 matching steps, 300 epochs of the new head in
batches of 32): the weighted mean of eight ResNet-8 x4, the mean of their gradients, matching, retraining. The plain side (tests/plain_matching.py)
differentiates through autograd class by class and trains a Linear with torch's SGD. Before anything is timed, both must have ended alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tests import plain_matching

from mllm_fl.algorithms.base import FedAvg, Server, Task, Update
from mllm_fl.algorithms.creff import CReFF
from mllm_fl.matching import Sums, fresh_head, gathering, head_gradient, mean_gradients
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.runs import environment
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone


def plain(method: CReFF, task: Task, s: Server, updates: list[Update]) -> Tree:
    """CReFF's server step, readable and slow: features and head after the round."""
    sums: Sums = {}
    FedAvg().server(task, s, gathering(updates, sums))
    features, head = s.extra["features"], (s.extra["head/weight"], s.extra["head/bias"])
    labels = torch.arange(len(task.class_names)).repeat_interleave(method.features)
    means = mean_gradients(sums, len(task.class_names))
    assert means is not None
    grads = {int(c): (w, b) for c, w, b in zip(*means, strict=True)}
    features = plain_matching.feature_match(
        features, labels, grads, *head, steps=method.match_steps, lr=method.match_lr
    )
    draws = task.stream("head", s.round + 1)
    weight, bias = plain_matching.retrain_head(
        features, labels, *fresh_head(head[0], draws), draws,
        epochs=method.head_epochs, lr=method.head_lr, batch=method.head_batch,
    )  # fmt: skip
    return {"features": features, "head/weight": weight, "head/bias": bias}


def a_round(classes: int, clients: int) -> tuple[Task, Server, list[Update]]:
    """Eight clients with half of the classes each; gradients of random non-negative features."""
    net = build_network(ModelConfig(), classes, 0)
    w = clone(net.state_dict())
    task = Task(net, tuple(f"class {c}" for c in range(classes)), (600,) * clients, 0)
    state, updates = CReFF().init(task, w), []
    head = state.extra["head/weight"], state.extra["head/bias"]
    for k in range(clients):
        g = stream(0, "benchmark", k)
        extra: Tree = {}
        for c in torch.randperm(classes, generator=g)[: classes // 2].tolist():
            real = torch.randn(32, head[0].shape[1], generator=g).relu()
            weight, bias = head_gradient(real, torch.full((32,), c), *head)
            extra |= {f"grad/{c}/weight": weight, f"grad/{c}/bias": bias}
        updates.append(Update(k, clone(w), 600.0, extra, {}))
    return task, state, updates


def main(argv: list[str] | None = None) -> None:
    """Prints a line a repetition and, last, one JSON object, which is also appended to ``--out``."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("results/bench.jsonl"), help="gets one line more")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    method = CReFF()
    task, state, updates = a_round(args.classes, args.clients)
    sides: dict[str, Callable[[CReFF], Tree]] = {
        "fused": lambda m: m.server(task, state, updates).extra,
        "plain": lambda m: plain(m, task, state, updates),
    }
    few = replace(method, match_steps=5, head_epochs=3)  # rounding has no time to grow
    a, b = sides["fused"](few), sides["plain"](few)
    apart = max(float((a[k] - b[k]).abs().max()) for k in a)
    if apart > 1e-4:
        raise SystemExit(f"the two servers disagree by {apart:.1e}; nothing was timed")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.repeats):
        for name in sides if i % 2 == 0 else reversed(sides):
            began, worked = time.perf_counter(), time.process_time()
            sides[name](method)
            seconds[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - worked)
        print(f"{i + 1}/{args.repeats}: " + ", ".join(f"{k} {v[-1]:.3f} s" for k, v in busy.items()), flush=True)
    where = environment()
    median = {name: statistics.median(s) for name, s in seconds.items()}
    worked_median = {name: statistics.median(s) for name, s in busy.items()}
    said = {
        "benchmark": "CReFF's server, a round", "classes": args.classes, "clients": args.clients,
        "cpu_seconds": {name: round(s, 4) for name, s in worked_median.items()},
        "seconds": {name: round(s, 4) for name, s in median.items()},
        "all_cpu_seconds": {name: [round(x, 4) for x in s] for name, s in busy.items()},
        "plain_over_fused": round(worked_median["plain"] / worked_median["fused"], 2),
        "largest_difference_after_a_short_round": apart, "repeats": args.repeats,
        "torch": where["torch"], "processor": where["processor"], "cores": where["cores"], "commit": where["commit"],
    }  # fmt: skip
    print(json.dumps(said))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
