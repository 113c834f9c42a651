"""Flower's simulation as an engine: the serial engine's bits with every method, over Flower's own messages; with Ray where it is installed."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from tests.deployment.grid import FakeGrid, failing
from tests.engines.methods_of_a_user import Raises, Remembers
from tests.engines.test_parallel import LOCAL, listening, play, serially

from mllm_fl.algorithms import METHODS
from mllm_fl.algorithms.base import Algorithm, FedAvg
from mllm_fl.conformance import toy
from mllm_fl.conformance.row import row_of
from mllm_fl.engines import channel, flower, simulated
from mllm_fl.engines.base import open_engine, possible
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.flower import GridLink, Handle, Simulation, client_app
from mllm_fl.engines.wire import Packed
from mllm_fl.errors import UserError

SIM = EngineConfig(name="flower-sim", workers=2)


class Here:
    """The place of Ray: nodes in this process, over a Grid without a network. ``faults`` by partition."""

    faults: dict[int, Any] = {}

    def __init__(self, handle: Handle, nodes: int, workers: int) -> None:
        there = {1000 - i: {"partition-id": i, "num-partitions": nodes} for i in range(nodes)}
        self.grid = FakeGrid(client_app(handle), there, {1000 - i: fault for i, fault in self.faults.items()})

    def __enter__(self) -> GridLink:
        return GridLink(self.grid)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(simulated, "Simulation", Here)
    monkeypatch.setattr(simulated, "can_simulate", lambda: None)
    monkeypatch.setattr(simulated, "POLL", 0.0)
    monkeypatch.setattr(channel, "INLINE", 0)  # images go through shared memory, as large ones do
    yield
    Here.faults = {}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("here")
def test_every_method_gives_the_serial_engines_bytes(name: str) -> None:
    row = row_of(name)
    world, method = row.world(), row.rich
    with open_engine(SIM, world.task, method, LOCAL) as engine:
        found = play(engine, method, world)
    assert found == serially(method, row.world())


@pytest.mark.usefixtures("here")
def test_a_clients_exception_names_client_and_round_and_its_traceback_is_kept() -> None:
    world, (told, on_event) = toy.world(), listening()
    with open_engine(SIM, world.task, Raises(), LOCAL, on_event=on_event) as engine:
        with pytest.raises(UserError, match="client 2, round 1: ZeroDivisionError.*events.jsonl"):
            play(engine, Raises(), world)
        with pytest.raises(UserError, match="client 2, round 1: ZeroDivisionError"):  # and it is fit for more
            play(engine, Raises(), world)
    assert told[0][0] == "client failed" and "methods_of_a_user.py" in told[0][1]["cause"]


@pytest.mark.usefixtures("here")
def test_a_process_that_died_is_one_line() -> None:
    world = toy.world()
    with open_engine(SIM, world.task, FedAvg(), LOCAL) as engine:
        Here.faults.clear()
        engine.link.grid.faults[999] = failing(0, "<class 'ray.exceptions.ActorDiedError'>")  # type: ignore[attr-defined]
        with pytest.raises(
            UserError, match="client 1, round 1: Flower says: unknown error of Flower; the same command"
        ):
            play(engine, FedAvg(), world)


@pytest.mark.usefixtures("here")
def test_what_is_open_is_closed_and_nothing_is_left_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    world = toy.world()
    with open_engine(SIM, world.task, FedAvg(), LOCAL) as engine:
        play(engine, FedAvg(), world, 1)
        [folder] = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o77 == 0
        assert not engine.desk._tickets  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_a_method_that_no_process_can_import_is_told_so_before_any_client() -> None:
    class Local(Algorithm):
        """Inside a function: there is nothing to import."""

    with pytest.raises(UserError, match=r"cannot be sent to another process.*in a module of its own"):
        open_engine(SIM, toy.world().task, Local(), LOCAL).__enter__()


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    says = r"^federate.engine.name: 'flower-sim' needs ray, which is not installed here; pip install 'mllm-fl\[flower-sim\]'"
    with pytest.raises(UserError, match=says):
        possible(SIM)
    with pytest.raises(UserError, match=says):
        open_engine(SIM, toy.world().task, FedAvg(), LOCAL)
    possible(EngineConfig())


def _unheard(kind: str, packed: Packed, node_config: Any, node: int) -> Packed:
    return packed


def test_a_simulation_that_cannot_start_is_one_line_and_the_environment_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Ending simulation.") from OSError("no room\nfor a raylet")

    monkeypatch.setattr("flwr.simulation.run_simulation", breaks)
    monkeypatch.setattr(flower, "can_simulate", lambda: None)
    monkeypatch.setattr(flower, "_start_ray", lambda workers: None)
    before = dict(os.environ)
    with pytest.raises(UserError, match="^flower-sim: Flower's simulation ended: no room; see /tmp/ray"):
        Simulation(_unheard, 2, 1).__enter__()
    assert dict(os.environ) == before
    assert "flower-sim" not in [t.name for t in threading.enumerate()]


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'mllm-fl[flower-sim]'"
)
@pytest.mark.parametrize("method", [FedAvg(), Remembers()], ids=["FedAvg", "with memory"])
def test_in_rays_processes_the_bytes_are_the_serial_engines(method: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "INLINE", 0)
    world, before = toy.world(), {k: os.environ.get(k) for k in (*flower.QUIET, *flower.RAY, "PYTHONPATH")}
    with open_engine(SIM, world.task, method, LOCAL) as engine:
        found = play(engine, method, world)
    assert found == serially(method, toy.world())
    assert {k: os.environ.get(k) for k in before} == before
