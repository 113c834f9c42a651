"""How much of a finished run's accuracy BatchNorm's statistics cost: the final model's accuracy as it is, and with statistics taken anew.

    python scripts/batchnorm_shift.py runs/methods_r/feddf-… runs/methods_r/fedavg-…     (MLLM_FL_DATA as for the run)

The new statistics are those of 2,000 images of the federation's long tail, un-augmented, in evaluation order; weights stay. A diagnosis, not a method:
no server could do it, since these images are the clients'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from mllm_fl.algorithms.base import Task
from mllm_fl.config import from_dict
from mllm_fl.data.federation import build
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.models.network import build_network
from mllm_fl.seeds import numpy_stream
from mllm_fl.toml import read_toml
from mllm_fl.trees import Tree


@torch.no_grad()
def estimated(task: Task, w: Tree, x: torch.Tensor) -> Tree:
    """``w`` with BatchNorm's running statistics replaced by the means over the batches of 100 of ``x`` (n, 3, h, w)."""
    net = task.net
    net.load_state_dict(w)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
    net.train()
    for batch in x.split(100):
        net(batch)
    return {k: v.clone() for k, v in net.state_dict().items()}


def main(argv: list[str] | None = None) -> None:
    """One line a run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, nargs="+")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    for folder in args.run:
        config = from_dict(read_toml(folder / "config.toml"), str(folder))
        federation = build(config.data)
        net = build_network(config.model, len(federation.class_names), config.seed)
        task = Task(net, federation.class_names, federation.population, config.seed)
        w = load_file(folder / "model.safetensors")
        tail = federation.subset
        chosen = numpy_stream(config.seed, "batchnorm shift").permutation(len(tail))[:2000]
        anew = estimated(task, w, tail.normalised(chosen.tolist()))
        before, after = (100 * evaluate(task, m, federation.test).scores(None)["accuracy"] for m in (w, anew))
        print(
            f"{folder.name}: {before:.1f} % as it is, {after:.1f} % with statistics of the clients' images", flush=True
        )


if __name__ == "__main__":
    main()
