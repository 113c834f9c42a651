"""What a step of an arm of experiments/table4_*.toml costs: ``python -m benchmarks.table4_cost FOLDER``, a folder by scripts/open_teacher.py.

Processor seconds, medians over the steps of one thread after the first two. One line of JSON an arm on standard output; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mllm_fl.config import load
from mllm_fl.models.network import build_network
from mllm_fl.stages import pretrain as stage
from mllm_fl.stages.pretraining import run as run_of


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--config", type=Path, default=Path("experiments/table4_cifar10.toml"))
    p.add_argument("--arms", nargs="+", default=["paper", "one", "features"])
    p.add_argument("--steps", type=int, default=8)
    args = p.parse_args()
    torch.set_num_threads(1)
    spent: list[float] = []
    whole = run_of.Run.step

    def step(self: run_of.Run, at: int) -> dict[str, Any]:
        start = time.process_time()
        row = whole(self, at)
        spent.append(time.process_time() - start)
        return row

    run_of.Run.step = step  # type: ignore[method-assign]
    for config in load(args.config).runs:
        if config.name not in args.arms or config.pretrain is None:
            continue
        c = replace(config.pretrain, teacher=str(args.folder / "mini-llava"), epochs=None, steps=args.steps)
        spent.clear()
        start = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            stage.pretrain(c, build_network(config.model, 10, 0), args.folder / "corpus", Path(out), side=32)
        seconds = statistics.median(spent[2 : args.steps])
        rest = time.process_time() - start - sum(spent)
        print(json.dumps({"arm": config.name, "step": round(seconds, 3), "before_and_after": round(rest, 1), "load": round(os.getloadavg()[0], 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
