"""Seconds that the data sets of MLLM_FL_DATA take on this machine: describe, decode, look for leaks, pack."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from mllm_fl.data.check import leaks
from mllm_fl.data.config import DataConfig
from mllm_fl.data.describe import summary
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.images import ImageSet
from mllm_fl.data.pack import load_pack, pack

T = TypeVar("T")


def timed(what: str, work: Callable[[], T]) -> T:
    """Do it once and print the seconds."""
    start = time.perf_counter()
    out = work()
    print(f"{time.perf_counter() - start:8.2f} s  {what}")
    return out


def _described(config: DataConfig) -> Federation:
    federation = build(config)
    summary(federation)
    return federation


def whole(images: ImageSet) -> object:
    """Every pixel of a set."""
    return images.read(range(len(images)))


def main() -> None:
    """One line per step, CIFAR-10 and CIFAR-100 with imbalance 100."""
    torch.set_num_threads(1)
    for source in ("cifar10", "cifar100"):
        config = DataConfig(source=source, imbalance_factor=100)
        federation = timed(f"{source}: build and describe", partial(_described, config))
        timed(f"{source}: decode the {len(federation.subset):,} long-tailed images", partial(whole, federation.subset))
        timed(f"{source}: decode the {len(federation.test):,} test images", partial(whole, federation.test))
        found = timed(f"{source}: look for leaks", partial(leaks, federation.subset, federation.test))
        print(f"{found:8d}    leaks")
        timed(
            f"{source}: decode the other {len(federation.leftover):,} training images",
            partial(whole, federation.leftover),
        )
    with tempfile.TemporaryDirectory() as folder:
        federation = build(DataConfig(source="cifar10", imbalance_factor=100))
        path = timed("cifar10: pack", lambda: pack(federation, Path(folder) / "pack"))
        print(f"{sum(f.stat().st_size for f in path.iterdir()) / 1e6:8.1f} MB the pack")
        timed("cifar10: open the pack", lambda: load_pack(path))


if __name__ == "__main__":
    main()
