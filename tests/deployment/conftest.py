"""A run on real digits with three sites in one process, over Flower's own messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

CONFIG = """
experiment = "deployed"
seeds = [3]
[data]
source = "digits"
imbalance_factor = 30
clients = 5
[model]
width = 2
adapter = "linear"
adapter_dim = 128
[federate]
rounds = 3
clients_per_round = 4
evaluate_last = 3
[federate.engine]
name = "serial"
precision = "fp32"
layout = "nchw"
[federate.local]
epochs = 1
batch_size = 8
lr = 0.05
augment = "crop"
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Minutes of real processes: `make test-deploy`, which is `pytest -m deploy`."""
    if "deploy" not in (config.getoption("-m") or ""):
        for item in items:
            if "deploy" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes long: make test-deploy"))


@pytest.fixture
def steady(tmp_path: Path) -> Iterator[Path]:
    """See :func:`tests.deployment.real.memory`."""
    from tests.deployment.real import memory

    with memory(tmp_path) as folder:
        yield folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that the simulator and a federation both run."""
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def nodes(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """Three nodes that play the data set's five clients: 0 and 3, 1 and 4, 2."""
    return {
        101 + i: {"partition-id": i, "num-partitions": 3, "site": f"site-{i + 1}", "state": str(tmp_path / f"node{i}")}
        for i in range(3)
    }


@pytest.fixture
def grids() -> list[Any]:
    """The grids that ``deployed`` has made, the one in use last."""
    return []


@pytest.fixture
def deployed(
    config: Path, nodes: dict[int, dict[str, Any]], grids: list[Any], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """``deployed(set, faults, **run_config)``: the run over a fake Grid; final.json's content."""
    from tests.deployment.grid import FakeGrid

    from mllm_fl.deployment.node import handle
    from mllm_fl.deployment.server import main
    from mllm_fl.deployment.sites import write_sites
    from mllm_fl.engines.flower import GridLink, client_app
    from mllm_fl.engines.reception import Site

    def run(set: str = "", faults: Mapping[int, Any] | None = None, **values: Any) -> dict[str, Any]:
        sites = tmp_path / "sites.json"
        if not sites.exists():
            write_sites(sites, [Site(f"site-{i + 1}", 101 + i) for i in range(3)])
        grid = FakeGrid(client_app(handle), nodes, faults)
        grids.append(grid)
        said = {"config": str(config), "set": set, "runs": str(tmp_path / "runs"), "sites": str(sites)}
        return main(GridLink(grid), said | {"poll": 0.01, "deadline": 60.0, "wait": 5.0} | values, 1)

    return run
