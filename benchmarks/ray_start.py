"""What Ray costs before it works: ``python -m benchmarks.ray_start`` (needs Ray: ``pip install 'mllm-fl[ray]'``).

Seconds until Ray runs, until the first batch of a pipeline is back, and of a whole pipeline, then of a second one; the backend answers at once.
One line of JSON on standard output; nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from typing import Any

from mllm_fl.annotate.backends import ray_data
from mllm_fl.annotate.backends.base import Deliver, Request
from mllm_fl.annotate.backends.ray_data import RayBackend
from mllm_fl.annotate.ledger import Entry


class AtOnce:
    """Answers everything with one word."""

    model, batch_size = "at once", 8

    def parameters(self) -> dict[str, Any]:
        return {}

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        deliver([(i, Entry(("word",), requests=1)) for i, _ in enumerate(requests)])


def pipeline(backend: RayBackend, count: int) -> tuple[float, float]:
    """(seconds to the first delivery, seconds in all)."""
    first: list[float] = []
    start = time.perf_counter()
    backend.answer([Request(b"x", ("?",))] * count, lambda found: first.append(time.perf_counter() - start))
    return first[0], time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=100)
    p.add_argument("--actors", type=int, default=2)
    args = p.parse_args()
    start = time.perf_counter()
    ray_data._data(args.actors)
    up = time.perf_counter() - start
    backend = RayBackend(AtOnce, "at once", {}, 8, args.actors)
    runs = [pipeline(backend, args.requests) for _ in range(2)]
    import ray

    load = os.getloadavg()[0]
    print(json.dumps({
        "ray": ray.__version__, "cores": os.cpu_count(), "load": round(load, 1), "requests": args.requests, "actors": args.actors,
        "start": round(up, 1), "first_batch": [round(a, 1) for a, _ in runs], "pipeline": [round(b, 1) for _, b in runs],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
