"""Whole runs in the batched engine, from a pack as it is carried to a GPU machine, and of a population that nobody lists."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.config import from_dict
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import build
from mllm_fl.data.pack import pack
from mllm_fl.events import Event
from mllm_fl.runs import read_json, read_rows
from mllm_fl.stages import chain


def config(data: dict[str, Any], engine: str = "batched", rounds: int = 2, algorithm: str = "scaffold") -> Any:
    device = {"device": "cpu"} if engine == "batched" else {}
    return from_dict(
        {
            "experiment": "here", "data": data, "model": {"width": 2},
            "federate": {
                "rounds": rounds, "clients_per_round": 3, "algorithm": algorithm, "sampling": "uniform",
                "engine": {"name": engine, **device}, "local": {"epochs": 1, "batch_size": 8, "augment": "crop"},
            },
        },
        "here",
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Long-tailed digits over five clients, in a folder of some hundred kilobytes."""
    data: dict[str, Any] = {
        "source": "digits",
        "clients": 5,
        "partition": "iid",
        "image_size": 8,
        "imbalance_factor": 10,
    }
    folder = tmp_path_factory.mktemp("pack") / "digits"
    pack(build(DataConfig(**data)), folder, leftover_per_class=1)
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 1 << 20
    return data | {"source": f"pack:{folder}"}


def test_a_pack_is_trained_as_the_serial_engine_trains_it(packed: dict[str, Any], tmp_path: Path) -> None:
    batched, serial = (chain.run(config(packed, name), tmp_path / name) for name in ("batched", "serial"))
    assert batched["last"]["accuracy"] == pytest.approx(serial["last"]["accuracy"], abs=0.01)
    where = batched["environment"]
    assert (where["device"], where["clients"]) == ("cpu", "one program")
    assert where["deterministic"].startswith("yes: CPU; within rounding")
    assert "clients" not in serial["environment"] and serial["environment"]["deterministic"].startswith("yes")
    env = read_json(tmp_path / "batched" / "here" / batched["name"] / "env.json")
    assert env["deterministic"] == where["deterministic"]
    events = read_rows(tmp_path / "batched" / "here" / batched["name"] / "events.jsonl")
    assert [e["clients"] for e in events if e["event"] == "engine"] == ["one program"]


def test_stopped_and_resumed_it_ends_with_the_same_bytes(packed: dict[str, Any], tmp_path: Path) -> None:
    """SCAFFOLD: what clients remember lies beside the checkpoint, and is that of the checkpoint's round."""
    whole = chain.run(config(packed, rounds=3), tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if event.stage == "federate" and event.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        chain.run(config(packed, rounds=3), tmp_path / "cut", progress=stop)
    folder = tmp_path / "cut" / "here" / whole["name"]
    assert sorted(p.name for p in (folder / "memory").iterdir()) != []
    shutil.copy(next((folder / "memory").iterdir()), folder / "memory" / "segment-000003")  # of a round that was killed
    again = chain.run(config(packed, rounds=3), tmp_path / "cut")
    assert again["weights_sha256"] == whole["weights_sha256"]
    names = ("rounds.jsonl", "clients.jsonl", *(f"memory/{p.name}" for p in (folder / "memory").iterdir()))
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "here" / whole["name"] / name).read_bytes(), name


def test_a_run_over_a_million_clients(tmp_path: Path) -> None:
    data = {"source": "digits", "clients": 1_000_000, "partition": "virtual", "min_size": 8, "image_size": 8}
    final = chain.run(config(data, "serial"), tmp_path)
    folder = tmp_path / "here" / final["name"]
    assert max(max(r["clients"]) for r in read_rows(folder / "rounds.jsonl")) > 10_000
    assert read_json(folder / "federation.json")["population"] == 1_000_000
    assert len(final["per_client"]["each"]) == 1000  # the first thousand stand for all
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 2 << 20
