"""Seconds and bytes of the page about many long runs: made-up run folders in the chain's form, ``--arms`` times ``--seeds`` of ``--rounds``.

    python scripts/report_size.py --arms 20 --seeds 5 --rounds 200

The mark is 100 runs of 200 rounds in less than 5 s and 10 MB; the time depends on the machine, so it is printed and not tested.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mllm_fl.metrics import per_client
from mllm_fl.report import build
from mllm_fl.toml import dumps

CLASSES, CLIENTS, ONLINE = 10, 20, 8


def run_folder(root: Path, arm: int, seed: int, rounds: int) -> Path:
    """One made-up finished run: accuracies that rise, one update in two hundred rejected, an online client in a hundred silent."""
    rng = np.random.default_rng([arm, seed])
    folder = root / f"arm{arm:03d}-{seed}"
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "name": f"arm {arm}", "seed": seed,
        "federate": {"rounds": rounds, "algorithm": "fedavg", "local": {"lr": 0.1 / (arm + 1)}},
    }  # fmt: skip
    (folder / "config.toml").write_text(dumps(config))
    rows, clients, timings = [], [], []
    for t in range(1, rounds + 1):
        each = np.clip(0.7 * (1 - np.exp(-t / 40)) + rng.normal(0, 0.05, CLASSES) + arm / 200, 0, 1)
        online = sorted(rng.choice(CLIENTS, ONLINE, replace=False).tolist())
        groups = {"many": each[:3].mean(), "medium": each[3:7].mean(), "few": each[7:].mean()}
        row = {
            "round": t,
            "clients": online,
            "evaluated": True,
            "accuracy": each.mean(),
            "class_weighted": each.mean(),
            **groups,
        }
        rejected = 0
        for k in online:
            if rng.random() < 0.01:
                continue
            bad = bool(rng.random() < 0.005)
            rejected += bad
            reason = "backbone.stem.weight has NaN" if bad else None
            clients.append({"round": t, "client": k, "samples": 620, "steps": 200, "loss": 1.0, "weight": 620.0,
                            "status": "rejected" if bad else "ok", "reason": reason, "bytes_up": 4921000, "bytes_down": 4921000})  # fmt: skip
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} | {
            "per_class": each.tolist(), "train_loss": 2.3 / t, "bytes_up": 1, "bytes_down": 1, "rejected": rejected, "ece": 0.1,
        })  # fmt: skip
        timings.append(
            {"round": t, "client_seconds": 1.0, "server_seconds": 0.1, "align_seconds": 0.0, "eval_seconds": 0.2}
        )
    for name, lines in (("rounds", rows), ("clients", clients), ("timings", timings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    histograms = [rng.integers(0, 200, CLASSES).tolist() for _ in range(CLIENTS)]
    held = [{"size": sum(h), "histogram": h} for h in histograms]
    (folder / "federation.json").write_text(json.dumps({"dataset": "made up", "clients": held}))
    last = rows[-1]
    scores = {k: last[k] for k in ("accuracy", "class_weighted", "many", "medium", "few", "per_class", "ece")}
    final = {
        "experiment": "size", "name": folder.name, "arm": config["name"], "seed": seed, "config_hash": f"{arm:04x}{seed:04x}",
        "class_names": [f"class {c}" for c in range(CLASSES)], "class_counts": list(range(100, 0, -10)),
        "groups": {"rule": "thirds", "many": [0, 1, 2], "medium": [3, 4, 5, 6], "few": [7, 8, 9]},
        "last": scores | {"confusion": rng.integers(0, 100, (CLASSES, CLASSES)).tolist()},
        "mean_last": {"rounds": 20, "n": 20, "mean": last["accuracy"], "sd": 0.01}, "max": {"accuracy": 0.9, "round": 1},
        "ema": {"accuracy": last["accuracy"]}, "leaks": {"train/test": 0}, "rounds": rounds, "command": "made up",
        "bytes_up": 10**9, "bytes_down": 10**9, "seconds": {"clients": 9.0, "server": 1.0, "total": 10.0},
        "per_client": per_client(scores["per_class"], histograms), "forgetting": {"mean": 0.1, "per_class": [0.1] * CLASSES},
    }  # fmt: skip
    (folder / "final.json").write_text(json.dumps(final))
    return folder


def main() -> int:
    """Print the runs, the seconds of three builds and the bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="write the folders and the page here, and leave them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        folders = [
            run_folder(root / "size", arm, seed, args.rounds) for arm in range(args.arms) for seed in range(args.seeds)
        ]
        took, worked = [], []
        for _ in range(3):
            start, cpu = time.perf_counter(), time.process_time()
            page = build(folders, root / "report.html", title="size")
            took.append(time.perf_counter() - start)
            worked.append(time.process_time() - cpu)
        size = page.stat().st_size
    seconds, busy = (" ".join(f"{t:.2f}" for t in times) for times in (took, worked))
    print(f"{len(folders)} runs x {args.rounds} rounds, {args.arms} arms: {seconds} s by the wall, ", end="")
    print(f"{busy} s of one core (other work does not count), {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
