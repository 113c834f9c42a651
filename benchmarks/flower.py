"""Seconds a round over Flower on one machine: 2, 4 and 8 nodes, without and with a process that stays beside each.

    python benchmarks/flower.py [--nodes 2 4 8] [--rounds 4] [--out results/deploy.jsonl]

Real SuperLink and SuperNodes with TLS and node keys on the loopback, digits, one local epoch: what is measured is Flower's processes and polls, not training. One federation grows from the smallest number
of nodes to the largest; then each node is given its worker, and it shrinks again. The first round of each run is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mllm_fl.deployment import control, follow, layout, processes
from mllm_fl.deployment.sites import read_sites, write_sites
from mllm_fl.runs import environment, read_rows

CONFIG = """
experiment = "flower"
[data]
source = "digits"
imbalance_factor = 30
clients = {nodes}
[model]
width = 4
[federate]
rounds = {rounds}
clients_per_round = {nodes}
evaluate_every = 1000
[federate.local]
epochs = 1
batch_size = 16
"""


def say(line: str) -> None:
    """To the terminal, at once."""
    print(line, file=sys.stderr, flush=True)


def measure(made: layout.Layout, nodes: int, worker: bool, rounds: int) -> dict[str, object]:
    """One run with the first ``nodes`` sites; the median over its rounds but the first."""
    sites = made.server / f"sites-{nodes}.json"
    write_sites(sites, read_sites(made.sites_json)[:nodes])
    values = follow.settings_of(
        made, sites=str(sites), runs=str(made.folder / f"runs-{worker}"), set=f"data.clients = {nodes}, federate.clients_per_round = {nodes}",
        deadline=1200.0, wait=1800.0, minimum=nodes,
    )  # fmt: skip
    path, number = follow.start(made, values, say)
    follow.follow(made, path, number, say)
    seconds = [e["seconds"] for e in read_rows(path / "events.jsonl") if e["event"] == "train exchanged"]
    env = environment()
    return {
        "nodes": nodes, "worker": worker, "seconds_a_round": statistics.median(seconds[1:]), "seconds": seconds,
        "rounds": len(seconds) - 1, "load": os.getloadavg()[0], "processor": env["processor"], "cores": env["cores"],
        "commit": env["commit"], "time": round(time.time()),
    }  # fmt: skip


def measurements(nodes: list[int], rounds: int, folder: Path) -> Iterator[dict[str, object]]:
    """Every number of nodes without workers, then with them."""
    most = max(nodes)
    config = folder / "run.toml"
    config.write_text(CONFIG.format(nodes=most, rounds=rounds))
    [port] = processes.free_ports(1)
    made = layout.init(folder / "there", sites=[f"s{i}" for i in range(most)], config=config, port=port)
    with contextlib.ExitStack() as kept:
        kept.enter_context(processes.superlink(made, say))
        control.wait_ready(made, 900)
        control.register(made)
        here = [layout.Node.read(made.site(name)) for name in made.sites]
        running: list[processes.Kept] = []
        for count in sorted(nodes):
            running += [kept.enter_context(processes.supernode(node, say)) for node in here[len(running) : count]]
            yield measure(made, count, False, rounds)
        for node in here:
            kept.enter_context(processes.worker(node, say))
        for count in sorted(nodes, reverse=True):
            while len(running) > count:
                running.pop().stop()
            yield measure(made, count, True, rounds)


def main() -> int:
    """Append a line a measurement."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    args.add_argument("--rounds", type=int, default=4)
    args.add_argument("--out", type=Path, default=Path("results/deploy.jsonl"))
    said = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in measurements(said.nodes, said.rounds, Path(folder)):
            with open(said.out, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
