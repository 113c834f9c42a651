"""One round in pfl-research's simulation: same network, clients, batches and steps as ``mllm-fl bench``. Runs in an environment of its own.

    PYTHONPATH=src PEER/bin/python benchmarks/peers/pfl_round.py --clients 8 --images 600 --width 64 --threads 2

Prints one JSON object: seconds of the second and later rounds. One process with ``--threads`` threads: its way to several processes
needs Horovod or torchrun, one more installation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Play ``--rounds`` rounds and say how long each took."""
    p = argparse.ArgumentParser()
    for name, value in (("clients", 8), ("images", 600), ("width", 64), ("batch", 32), ("rounds", 3), ("threads", 1)):
        p.add_argument(f"--{name}", type=int, default=value)
    args = p.parse_args()
    import numpy as np
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    from mllm_fl.engines.bench import Load
    from mllm_fl.models.network import ModelConfig, build_network

    torch.set_num_threads(args.threads)
    load = Load(clients=args.clients, images=args.images, width=args.width, batch=args.batch)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_network(ModelConfig(width=load.width), 10, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(x)[1]
            return logits

        def loss(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:
            self.train(not eval)
            return F.cross_entropy(self(x), y)

        @torch.no_grad()
        def metrics(self, x: torch.Tensor, y: torch.Tensor, eval: bool = True) -> dict[str, Any]:
            return {"loss": Weighted(0.0, len(y))}  # nothing is evaluated, as in every other contestant

    data = {s.client: (s.x(range(len(s))), s.y) for s in load.shards(load.clients, load.images)}
    sampler = get_user_sampler("minimize_reuse", list(data))
    dataset = FederatedDataset(lambda k: Dataset(raw_data=list(data[k]), user_id=str(k)), sampler)
    times: list[float] = []

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
            times.append(time.perf_counter())
            used.append(time.process_time())
            return False, Metrics()

    used: list[float] = []
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=load.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(local_batch_size=load.batch, local_num_epochs=1, local_learning_rate=0.1),
        model_eval_params=None,
        callbacks=[Clock()],
    )
    laps, cpu = ([b - a for a, b in itertools.pairwise(v)] for v in (times, used))
    said = {"peer": f"pfl-research {version('pfl')}", "torch": torch.__version__, "threads": args.threads}
    print(json.dumps(said | {"seconds": laps, "core_seconds": cpu, "numpy": np.__version__}))


if __name__ == "__main__":
    main()
