"""What a round costs as the population and the clients online grow, and what heterogeneity and imbalance do; then the page about it.

    nice .venv/bin/python -m benchmarks.scale population      seconds, memory and disk, 10^3 to 10^6 virtual clients
    nice .venv/bin/python -m benchmarks.scale skew            accuracy and seconds over alpha and imbalance, on digits
    .venv/bin/python -m benchmarks.scale page                 docs/scale.md and docs/scale.svg, from results/scale.jsonl

Each setting runs in a process of its own, one thread, serial engine, and appends a line to results/scale.jsonl. ``population`` trains SCAFFOLD, because it
makes every client remember as much as the model weighs, on a network so small that a round is what the engine costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_fl.report.marked import fill

ROUNDS, SHORT = 50, 10
POPULATION = [(10**3, 1000, ROUNDS), (10**4, 1000, SHORT), (10**5, 1000, SHORT), (10**6, 1000, ROUNDS)]
POPULATION += [(10**6, 10, SHORT), (10**6, 100, SHORT)]  # clients, online, rounds
SKEW = [(a, 50.0) for a in (5.0, 0.5, 0.1, 0.05, 0.01)] + [(0.5, i) for i in (10.0, 100.0, 200.0)]  # alpha, imbalance
SEEDS = 1
KEYS = ("mllm_fl", "commit", "torch", "processor", "cores")


def resident() -> int:
    """Bytes of this process that lie in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def population(clients: int, online: int, rounds: int) -> dict[str, Any]:
    """A run over a virtual population: per round seconds and resident bytes; what lies on the disk at the end."""
    import torch

    from mllm_fl.algorithms.base import Task
    from mllm_fl.algorithms.scaffold import Scaffold
    from mllm_fl.conformance.toy import tiny_net
    from mllm_fl.data.config import DataConfig
    from mllm_fl.data.federation import build
    from mllm_fl.engines.config import EngineConfig
    from mllm_fl.engines.local import LocalConfig
    from mllm_fl.events import Event
    from mllm_fl.runs import RunFolder
    from mllm_fl.stages.federate import federate
    from mllm_fl.stages.schedule import FederateConfig
    from mllm_fl.trees import clone

    torch.set_num_threads(1)
    start = time.perf_counter()
    data = DataConfig(partition="virtual", clients=clients, min_size=20, alpha=0.5, imbalance_factor=10, image_size=8)
    federation = build(data)
    net = tiny_net(10)
    task = Task(net, federation.class_names, federation.population, 0)
    local = LocalConfig(epochs=1, batch_size=20, lr=0.05, augment="none")
    config = FederateConfig(
        algorithm="scaffold", method=Scaffold(), rounds=rounds, clients_per_round=online, sampling="uniform", local=local,
        evaluate_every=10, evaluate_last=1, engine=EngineConfig(name="serial"),
    )  # fmt: skip
    built = time.perf_counter() - start
    seen: list[tuple[float, int]] = []

    def note(event: Event) -> None:
        seen.append((time.process_time(), resident()))

    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run", {}) as run:
        began = time.process_time()
        federate(config, task, federation, clone(net.state_dict()), run, progress=note)
        disk = sum(p.stat().st_size for p in (run.path / "memory").iterdir())
        checkpoint = (run.path / "checkpoint.safetensors").stat().st_size
    seconds = [b - a for a, b in zip([began, *(t for t, _ in seen)], (t for t, _ in seen), strict=False)]
    return {
        "benchmark": "scale: population", "clients": clients, "online": online, "rounds": rounds,
        "seconds_to_build": round(built, 4), "cpu_seconds_a_round": round(statistics.median(seconds[1:]), 4),
        "cpu_seconds": [round(s, 3) for s in seconds], "bytes": [b for _, b in seen],
        "memory_on_disk": disk, "checkpoint_bytes": checkpoint,
    }  # fmt: skip


def skew(alpha: float, imbalance: float, seed: int) -> dict[str, Any]:
    """FedAvg on 10,000 virtual clients of real digits: 20 images a client, 20 clients online."""
    from mllm_fl.config import from_dict
    from mllm_fl.stages import chain

    raw = {
        "experiment": "skew", "seed": seed,
        "data": {
            "source": "digits", "partition": "virtual", "clients": 10_000, "min_size": 20, "alpha": alpha,
            "imbalance_factor": imbalance, "image_size": 8,
        },
        "model": {"width": 8, "feature_norm": "layernorm"},
        "federate": {
            "rounds": 60, "clients_per_round": 20, "sampling": "uniform", "evaluate_every": 5, "evaluate_last": 10,
            "report_last": 10, "engine": {"name": "serial", "precision": "fp32", "layout": "nchw"},
            "local": {"epochs": 2, "batch_size": 10, "lr": 0.05, "augment": "crop"},
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        final = chain.run(from_dict(raw, "benchmarks/scale.py"), Path(folder))
    return {
        "benchmark": "scale: skew", "alpha": alpha, "imbalance": imbalance, "seed": seed, "clients": 10_000, "online": 20,
        "accuracy": final["mean_last"]["mean"], "last": {k: final["last"][k] for k in ("accuracy", "many", "medium", "few")},
        "forgetting": final["forgetting"]["mean"], "cpu_seconds": round(time.process_time() - began, 2),
    }  # fmt: skip


def rows(out: Path, benchmark: str) -> list[dict[str, Any]]:
    """The last line of each setting."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        row = json.loads(line)
        if row["benchmark"] == benchmark:
            found[tuple(row.get(k) for k in ("clients", "online", "alpha", "imbalance", "seed"))] = row
    return list(found.values())


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in body])


def mb(n: float) -> str:
    return f"{n / 2**20:,.1f}"


def where(found: Sequence[dict[str, Any]]) -> str:
    return "; ".join(sorted({f"{r['processor']}, torch {r['torch']}, commit {r['commit']}" for r in found}))


def population_table(found: Sequence[dict[str, Any]]) -> str:
    body = []
    for r in sorted(found, key=lambda r: (r["online"], r["clients"])):
        late = f"{r['bytes'][49] / r['bytes'][4]:.3f}" if r["rounds"] >= 50 else "–"
        body.append([
            f"{r['clients']:,}", f"{r['online']:,}", f"{r['cpu_seconds_a_round']:.2f}",
            f"{1e3 * r['cpu_seconds_a_round'] / r['online']:.2f}", mb(r["bytes"][4]), mb(r["bytes"][9]), late,
            mb(r["memory_on_disk"]), f"{r['checkpoint_bytes'] / 2**10:,.0f}", f"{r['seconds_to_build']:.2f}",
        ])  # fmt: skip
    head = [
        "clients", "online", "s a round", "ms a client", "MB, round 5", "MB, round 10", "round 50 / round 5",
        "MB remembered on disk", "kB checkpoint", "s to build",
    ]  # fmt: skip
    return table(head, body)


def skew_table(found: Sequence[dict[str, Any]]) -> str:
    body = []
    for alpha, imbalance in SKEW:
        of = [r for r in found if (r["alpha"], r["imbalance"]) == (alpha, imbalance)]
        if not of:
            continue
        columns = [[r["accuracy"] for r in of], *([r["last"][g] for r in of] for g in ("many", "medium", "few"))]
        columns.append([r["forgetting"] for r in of])
        shown = [
            f"{100 * statistics.mean(c):.1f}" + (f" ± {100 * statistics.stdev(c):.1f}" if len(c) > 1 else "")
            for c in columns
        ]
        body.append(
            [
                f"{alpha:g}",
                f"{imbalance:g}",
                *shown,
                f"{statistics.median(r['cpu_seconds'] for r in of):.0f}",
                str(len(of)),
            ]
        )
    head = [
        "alpha",
        "imbalance",
        "accuracy, mean of the last 10 rounds",
        "many",
        "medium",
        "few",
        "forgetting",
        "CPU seconds",
        "seeds",
    ]
    return table(head, body)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels: seconds a round over clients online and population; memory over rounds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scale", "font.size": 9}):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        million = sorted((r for r in found if r["clients"] == 10**6), key=lambda r: r["online"])
        left.loglog([r["online"] for r in million], [r["cpu_seconds_a_round"] for r in million], "o-")
        left.set(xlabel="clients online, of a million", ylabel="CPU seconds a round")
        many = sorted((r for r in found if r["online"] == 1000), key=lambda r: r["clients"])
        middle.semilogx([r["clients"] for r in many], [r["cpu_seconds_a_round"] for r in many], "o-")
        middle.set(xlabel="population, 1,000 online", ylabel="CPU seconds a round", ylim=(0, None))
        for r in (r for r in many if r["rounds"] >= 50):
            right.plot(
                range(1, len(r["bytes"]) + 1), [b / 2**20 for b in r["bytes"]], label=f"{r['clients']:,} clients"
            )
        right.set(xlabel="round", ylabel="resident MB", ylim=(0, None))
        right.legend(frameon=False)
        for axes in (left, middle, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def page(out: Path, docs: Path) -> None:
    """docs/scale.md from its template: what stands between the marks is replaced."""
    big, skewed = rows(out, "scale: population"), rows(out, "scale: skew")
    parts = {
        "population": f"{population_table(big)}\n\n{where(big)}; one thread, beside other work.",
        "skew": f"{skew_table(skewed)}\n\n{where(skewed)}; one thread, beside other work.",
    }
    fill(docs / "scale.md", parts)
    draw(big, docs / "scale.svg")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("population", "skew", "page"))
    p.add_argument("--one", help="run this setting here, as a JSON list, and print its line")
    p.add_argument("--only", type=json.loads, help="of the settings those whose first values are these, a JSON list")
    p.add_argument("--out", type=Path, default=Path("results/scale.jsonl"), help="gets a line a setting")
    args = p.parse_args(argv)
    if args.what == "page":
        page(args.out, Path("docs"))
        return
    call: Any = {"population": population, "skew": skew}[args.what]
    if args.one:
        from mllm_fl.runs import environment

        where = environment()
        print(json.dumps(call(*json.loads(args.one)) | {k: where[k] for k in KEYS}))
        return
    settings: list[list[Any]] = [list(s) for s in POPULATION]
    if args.what == "skew":
        settings = [[a, i, s] for s in range(SEEDS) for a, i in SKEW]
    for setting in settings:
        if args.only and setting[: len(args.only)] != args.only:
            continue
        command = [sys.executable, "-m", "benchmarks.scale", args.what, "--one", json.dumps(setting)]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        with open(args.out, "a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(
            setting,
            {k: v for k, v in json.loads(line).items() if not isinstance(v, list) and k not in KEYS},
            flush=True,
        )


if __name__ == "__main__":
    main()
