"""The command line as a user meets it: one line of error, the right status, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
rounds = {rounds}
clients_per_round = 2
evaluate_every = 100
evaluate_last = 1
[federate.local]
epochs = 1
augment = "none"
"""


def cli(*args: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mllm_fl.cli", *args],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL.format(rounds=2))
    return tmp_path


def test_run_prints_a_table_and_leaves_a_finished_folder(small: Path) -> None:
    done = cli("run", "small.toml", cwd=small)
    assert done.returncode == 0, done.stderr
    assert "toy" in done.stdout
    folders = list((small / "runs" / "small").iterdir())
    assert len(folders) == 1
    names = {p.name for p in folders[0].iterdir()}
    assert names >= {
        "config.toml",
        "env.json",
        "manifest.json",
        "rounds.jsonl",
        "clients.jsonl",
        "timings.jsonl",
        "final.json",
        "model.safetensors",
    }
    final = json.loads((folders[0] / "final.json").read_text())
    assert final["leaks"] == {"train/test": 0}
    before = {p.name: p.read_bytes() for p in folders[0].iterdir()}
    again = cli("run", "small.toml", cwd=small)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert {p.name: p.read_bytes() for p in folders[0].iterdir()} == before


def test_overrides_are_typed_and_make_another_run(small: Path) -> None:
    done = cli("run", "small.toml", "--federate.rounds", "1", "--data.alpha", "0.1", cwd=small)
    assert done.returncode == 0, done.stderr
    (folder,) = (small / "runs" / "small").iterdir()
    assert "rounds = 1" in (folder / "config.toml").read_text()
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 1


MISTAKES = [
    (["run", "smal.toml"], "smal.toml: no such file; did you mean small.toml?"),
    (["run", "small.toml", "--arm", "nobody"], "--arm: 'nobody' is not an arm of small.toml; arms: toy"),
    (["run", "small.toml", "--federate.rounds", "many"], "federate.rounds"),
    (["run", "small.toml", "--federate.runds", "3"], "federate.runds"),
    (["run", "small.toml", "--federate.rounds", "0"], "federate.rounds: 0 is below 1"),
    (["run", "small.toml", "--jobs", "0"], "--jobs: 0 is below 1"),
    (["run", "small.toml", "--data.source", "folder:/nowhere/at/all"], "/nowhere/at/all"),
    (["run", "small.toml", "--data.source", "cifra10"], "did you mean 'cifar10'"),
    (["run", "small.toml", "--model.name", "resnet9"], "model.name: unknown model 'resnet9'"),
    (["run", "small.toml", "--runs", "small.toml"], "the run folder cannot be written"),
    (["pretrain", "small.toml"], "pretrain: the configuration has no [pretrain] table"),
    (["align", "small.toml"], "align: the configuration has no [align] table"),
    (["report", "nowhere"], "nowhere"),
    (["data", "describe", "digits", "--alpha", "0"], "data.alpha"),
    (["data", "describe", "cifar10", "--root", "/nowhere"], "/nowhere"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_bad_input_is_one_line_and_status_2(small: Path, args: list[str], message: str) -> None:
    done = cli(*args, cwd=small)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_help_is_quick_because_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, mllm_fl.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch','numpy','tyro','transformers','rich') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "federate" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_says_so_and_resumes_to_equal_bytes(tmp_path: Path, which: signal.Signals) -> None:
    (tmp_path / "small.toml").write_text(SMALL.format(rounds=30))
    args = [sys.executable, "-m", "mllm_fl.cli", "run", "small.toml", "--runs"]
    with subprocess.Popen(
        [*args, "a"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        while not list(tmp_path.glob("a/small/*/checkpoint.safetensors")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        process.send_signal(which)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "mllm-fl: interrupted; the same command resumes"
    assert "Traceback" not in said
    assert not list(tmp_path.glob("a/small/*/final.json"))
    for root in ("a", "b"):
        assert subprocess.run([*args, root], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    rows = [next(tmp_path.glob(f"{root}/small/*/rounds.jsonl")).read_bytes() for root in ("a", "b")]
    assert rows[0] == rows[1]


def test_full_disk_is_one_line_and_resumable(small: Path) -> None:
    """/dev/full stands for a disk without space: the first row that cannot be written stops the run."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    assert cli("run", "small.toml", cwd=small).returncode == 0
    (folder,) = (small / "runs" / "small").iterdir()
    for name in ("final.json", "checkpoint.safetensors", "rounds.jsonl", "clients.jsonl", "timings.jsonl"):
        (folder / name).unlink()
    (folder / "events.jsonl").unlink()
    (folder / "clients.jsonl").symlink_to("/dev/full")
    done = cli("run", "small.toml", cwd=small)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "final.json").exists()


def test_json_of_describe_is_exactly_one_object(tmp_path: Path) -> None:
    done = cli("data", "describe", "digits", "--imbalance-factor", "30", "--json", cwd=tmp_path)
    described = json.loads(done.stdout)
    assert set(described) == {
        "dataset",
        "imbalance_factor",
        "partition",
        "alpha",
        "seed",
        "class_counts",
        "total",
        "subset_sha256",
        "clients",
    }
    assert described["total"] == 266 == sum(c["size"] for c in described["clients"])
    assert set(described["clients"][0]) == {"size", "sha256", "histogram"}


def test_two_jobs_give_the_bytes_of_one(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL.format(rounds=2).replace('name = "toy"', "seeds = [0, 1]"))
    assert cli("run", "small.toml", "--runs", "one", cwd=tmp_path).returncode == 0
    done = cli("run", "small.toml", "--runs", "two", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (sorted(tmp_path.glob(f"{root}/small/*/rounds.jsonl")) for root in ("one", "two"))
    assert len(one) == 2
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert [p.parent.name for p in one] == [p.parent.name for p in two]


def test_another_algorithm_on_the_command_line_brings_its_own_fields(small: Path) -> None:
    done = cli("run", "small.toml", "--federate.algorithm", "fedprox", "--federate.method.mu", "0.5", cwd=small)
    assert done.returncode == 0, done.stderr
    (final,) = (small / "runs" / "small").glob("*/final.json")
    assert json.loads(final.read_text())["method"] == {"mu": 0.5}
    wrong = cli("run", "small.toml", "--federate.algorithm=fedprx", cwd=small)
    assert wrong.returncode == 2 and "did you mean 'fedprox'?" in wrong.stderr
