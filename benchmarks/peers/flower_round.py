"""One round in Flower's simulation (Ray): same network, clients, batches and steps as ``mllm-fl bench``. Runs in an environment of its own.

    PYTHONPATH=src PEER/bin/python benchmarks/peers/flower_round.py --clients 8 --images 600 --width 64

Prints one JSON object: seconds of the second and later rounds (the first also starts Ray's workers) and the processor time inside clients.
Each client process gets one core and one thread; the server averages with FedAvg, and evaluates nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from typing import Any


def main() -> None:
    """Play ``--rounds`` rounds and say how long each took."""
    p = argparse.ArgumentParser()
    for name, value in (("clients", 8), ("images", 600), ("width", 64), ("batch", 32), ("rounds", 3)):
        p.add_argument(f"--{name}", type=int, default=value)
    args = p.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import flwr
    import numpy as np
    import torch
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    from mllm_fl.engines.bench import Load, bare
    from mllm_fl.models.network import ModelConfig, build_network

    torch.set_num_threads(1)
    load = Load(clients=args.clients, images=args.images, width=args.width, batch=args.batch)
    start = build_network(ModelConfig(width=args.width), 10, 0).state_dict()
    times: list[float] = []
    inside: list[float] = []

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(
            self, parameters: list[np.ndarray], config: dict[str, Any]
        ) -> tuple[list[np.ndarray], int, dict[str, float]]:
            torch.set_num_threads(1)
            net = build_network(ModelConfig(width=load.width), 10, 0)
            w = {k: torch.as_tensor(v) for k, v in zip(start, parameters, strict=True)}
            shard = load.shard(self.number, load.images)
            began = time.process_time()
            [ended] = bare(net, w, [shard], load.local)
            used = time.process_time() - began
            return [v.numpy() for v in ended.values()], load.images, {"seconds": used}

    def client(context: Context) -> Any:
        return Client(int(context.node_config["partition-id"])).to_client()

    class Timed(FedAvg):  # type: ignore[misc]
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            found = super().aggregate_fit(server_round, results, failures)
            if failures or len(results) != load.clients:
                raise SystemExit(f"{len(results)} of {load.clients} clients answered")
            times.append(time.perf_counter())
            inside.append(sum(r.metrics["seconds"] for _, r in results))
            return found

    def server(context: Context) -> ServerAppComponents:
        strategy = Timed(
            fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=load.clients, min_available_clients=load.clients,
            initial_parameters=ndarrays_to_parameters([v.numpy() for v in start.values()]),
        )  # fmt: skip
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=args.rounds))

    run_simulation(
        server_app=ServerApp(server_fn=server), client_app=ClientApp(client_fn=client), num_supernodes=load.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
    )  # fmt: skip
    laps = [b - a for a, b in itertools.pairwise(times)]
    print(
        json.dumps(
            {
                "peer": f"Flower {flwr.__version__} simulation",
                "torch": torch.__version__,
                "seconds": laps,
                "core_seconds": inside[1:],
            }
        )
    )


if __name__ == "__main__":
    main()
