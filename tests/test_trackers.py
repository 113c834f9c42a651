"""Trackers are shown what the run folder holds, and whatever they do, the run ends as without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mllm_fl import trackers
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows
from mllm_fl.trackers import Mirror, check
from tests.report.folders import run_folder

SMALL = """
experiment = "small"
name = "toy"
[data]
source = "digits"
imbalance_factor = 10
clients = 4
[model]
width = 2
[federate]
rounds = 2
clients_per_round = 2
[federate.local]
epochs = 1
augment = "none"
"""


class Notebook:
    """A tracker that remembers what it was told."""

    told: list[Any] = []

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.told.append(("start", folder.name, config["federate.rounds"]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((step, values["accuracy"]))

    def finish(self, summary: Mapping[str, float]) -> None:
        self.told.append(("finish", dict(summary)))


class Offline(Notebook):
    """A tracker that needs the network."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        raise ConnectionError("no route\nto host")


class Silent(Notebook):
    """A tracker that hangs until the test lets it go."""

    gate = threading.Event()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.gate.wait()


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(Notebook, "told", [])
    monkeypatch.setattr(Silent, "gate", threading.Event())
    for name, kind in (("notebook", Notebook), ("offline", Offline), ("silent", Silent)):
        monkeypatch.setitem(trackers.TRACKERS, name, (kind, "json", ""))
    return Notebook.told


def test_each_round_is_shown_once_and_the_summary_last(tmp_path: Path, notebook: list[Any]) -> None:
    run = run_folder(tmp_path, rounds=3)
    rows = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rounds.jsonl").write_bytes(rows[0])
    mirror = Mirror(run, ["notebook"])
    mirror.look()
    (run / "rounds.jsonl").write_bytes(b"".join(rows[:2]) + rows[2][:9])  # the third is being written
    mirror.look()
    mirror.look()
    (run / "rounds.jsonl").write_bytes(b"".join(rows))
    mirror.close()
    last = {"last": 0.5, "mean_last": 0.5, "few": 0.25, "seconds": 2.0}
    assert notebook == [("start", run.name, 3), (1, 0.5), (2, 0.5), (3, 0.5), ("finish", last)]


def test_a_resumed_run_shows_no_round_twice_and_a_late_tracker_all_of_them(tmp_path: Path, notebook: list[Any]) -> None:
    run = run_folder(tmp_path, rounds=3)
    rows = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rounds.jsonl").write_bytes(b"".join(rows[:2]))
    final = (run / "final.json").read_text()
    (run / "final.json").unlink()
    Mirror(run, ["notebook"]).close()  # interrupted after two rounds
    assert notebook == [("start", run.name, 3), (1, 0.5), (2, 0.5), ("finish", {})]
    (run / "rounds.jsonl").write_bytes(rows[0])  # resuming cuts back to the checkpoint and plays round 2 again
    mirror = Mirror(run, ["notebook"])
    mirror.look()
    (run / "rounds.jsonl").write_bytes(b"".join(rows))
    (run / "final.json").write_text(final)
    mirror.close()
    assert [t[0] for t in notebook[4:]] == ["start", 3, "finish"]


@pytest.mark.parametrize(
    ("name", "reason"), [("offline", "ConnectionError: no route to host"), ("silent", "does not answer for 0.1 s")]
)
def test_a_tracker_that_fails_is_left_behind_with_an_event(
    tmp_path: Path, notebook: list[Any], name: str, reason: str
) -> None:
    run = run_folder(tmp_path)
    said: list[str] = []
    mirror = Mirror(run, [name], said.append, patience=0.1 if name == "silent" else 30)
    mirror.look()
    mirror.close()
    Silent.gate.set()
    (event,) = [e for e in read_rows(run / "events.jsonl") if e["event"] == "tracker failed"]
    assert (event["tracker"], event["reason"]) == (name, reason)
    assert said == [f"--track {name}: left behind ({reason}); the run goes on"]


def test_what_is_unknown_or_missing_is_one_line_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--track: 'mlflow' is unknown; choose tensorboard, trackio, wandb"):
        check(["mlflow"])
    monkeypatch.setitem(trackers.TRACKERS, "absent", (Notebook, "no_such_package", "mllm-fl[absent]"))
    with pytest.raises(UserError, match=r"no_such_package is not installed; pip install 'mllm-fl\[absent\]'"):
        check(["absent"])


def cable_out() -> list[str]:
    """The words that run a command in a network namespace of its own, without routes.

    Raises:
        AssertionError: this system does not allow it.
    """
    words = ["unshare", "--user", "--map-root-user", "--net"]
    found = (
        shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    )
    if not found:
        pytest.skip("this system allows no network namespaces (unshare --user --net)")
    return words


def test_with_the_network_cable_out_everything_still_works(tmp_path: Path) -> None:
    """Real TensorBoard and trackio, in a namespace where even the loopback interface is down."""
    (tmp_path / "small.toml").write_text(SMALL)
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "mllm_fl.cli", "run", "small.toml"]
    more = ["--track", "tensorboard", "--track", "trackio", "--runs", "tracked"]
    tracked = subprocess.run(
        [*cable_out(), *command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert tracked.returncode == 0, tracked.stderr
    plain = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert plain.returncode == 0 and plain.stdout == tracked.stdout
    a, b = next((tmp_path / "tracked").glob("*/*/")), next((tmp_path / "runs").glob("*/*/"))
    for name in ("rounds.jsonl", "clients.jsonl", "config.toml"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert [e for e in read_rows(a / "events.jsonl") if e["event"] == "tracker failed"] == []
    accuracy = [row["accuracy"] for row in read_rows(a / "rounds.jsonl")]
    assert scalars(a / "tensorboard", "accuracy") == pytest.approx(accuracy)
    assert list((tmp_path / "trackio").rglob("*.db")) or list((tmp_path / "trackio").rglob("*.parquet"))
    assert json.loads((a / trackers.MARK).read_text()) == {"tensorboard": 2, "trackio": 2}


def scalars(folder: Path, tag: str) -> list[float]:
    """A curve from TensorBoard's event files, read with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [float(e.value) for e in events.Scalars(tag)]
