"""A run of the parallel engine that was stopped and taken up again ends with the bytes of a serial run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import toy

from mllm_fl.algorithms import find
from mllm_fl.conformance.row import ROWS
from mllm_fl.engines.base import Engine
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.parallel import ParallelEngine
from mllm_fl.engines.pool import Pool
from mllm_fl.engines.serial import SerialEngine
from mllm_fl.events import Event
from mllm_fl.runs import RunFolder
from mllm_fl.stages.federate import federate
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import digest

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "scaffold", "creff", "fedyoyo"])
def test_stopped_and_resumed_by_workers_is_one_serial_run(name: str, pool: Pool, tmp_path: Path) -> None:
    """Without and with client memory (SCAFFOLD, FedYoYo); the server's state grows in FedAvgM, SCAFFOLD and CReFF."""
    fed = toy.federation(partition="dirichlet")
    task, w = toy.task(fed)
    method = find(name)(**ROWS[name])
    config = FederateConfig(algorithm=name, method=method, rounds=3, clients_per_round=3, local=LOCAL)

    def play(folder: Path, engine: Engine, until: int) -> str:
        def stop(event: Event) -> None:
            if event.done == until:
                raise KeyboardInterrupt

        with RunFolder(folder, {"a": 1}) as run, engine:
            return digest(federate(config, task, fed, w, run, batch_norm="local", progress=stop, engine=engine).w)

    args = (task, method, LOCAL, "local")
    whole = play(tmp_path / "whole", SerialEngine(EngineConfig(), *args), 99)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "stopped", ParallelEngine(EngineConfig(), *args, pool=pool), 2)
    assert play(tmp_path / "stopped", ParallelEngine(EngineConfig(), *args, pool=pool), 99) == whole
    for file in ("rounds.jsonl", "clients.jsonl"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
