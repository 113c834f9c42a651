"""Seconds a round over Flower on one machine: 2, 4 and 8 nodes, with and without a process that stays beside each.

    python benchmarks/flower.py [--nodes 2 4 8] [--rounds 4] [--out results/deploy.jsonl]

Real SuperLink and SuperNodes with TLS and node keys on the loopback, digits, one local epoch: what is measured is Flower's processes and polls, not training. The first round is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mllm_fl.deployment import control, follow, layout, processes
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


def measure(nodes: int, worker: bool, rounds: int, folder: Path) -> dict[str, object]:
    """One federation, started and ended; the median over its rounds but the first."""
    config = folder / "run.toml"
    config.write_text(CONFIG.format(nodes=nodes, rounds=rounds))
    [port] = processes.free_ports(1)
    made = layout.init(folder / "there", sites=[f"s{i}" for i in range(nodes)], config=config, port=port)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    kept: list[processes.Kept] = []
    try:
        kept.append(processes.superlink(made, say).__enter__())
        control.wait_ready(made, 900)
        control.register(made)
        for name in made.sites:
            node = layout.Node.read(made.site(name))
            kept += [processes.worker(node, say).__enter__()] if worker else []
            kept.append(processes.supernode(node, say).__enter__())
        path, number = follow.start(made, follow.settings_of(made, deadline=1200.0, wait=1800.0, minimum=nodes), say)
        follow.follow(made, path, number, say)
    finally:
        for one in reversed(kept):
            one.stop()
    seconds = [e["seconds"] for e in read_rows(path / "events.jsonl") if e["event"] == "train exchanged"]
    env = environment()
    return {
        "nodes": nodes, "worker": worker, "seconds_a_round": statistics.median(seconds[1:]), "seconds": seconds,
        "rounds": len(seconds) - 1, "load": os.getloadavg()[0], "processor": env["processor"], "cores": env["cores"],
        "commit": env["commit"], "time": round(time.time()),
    }  # fmt: skip


def main() -> int:
    """Append a line a measurement."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    args.add_argument("--rounds", type=int, default=4)
    args.add_argument("--worker", choices=("no", "yes", "both"), default="both")
    args.add_argument("--out", type=Path, default=Path("results/deploy.jsonl"))
    said = args.parse_args()
    for nodes in said.nodes:
        for worker in {"no": [False], "yes": [True], "both": [False, True]}[said.worker]:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(nodes, worker, said.rounds, Path(folder))
            with open(said.out, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
