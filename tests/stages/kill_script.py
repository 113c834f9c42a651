"""Kill a run with SIGKILL at many points, resume it, and print what was left. Started by test_kill.py in a fresh process.

Every place where a run touches the disk or finishes a piece of work is a point: before and after each flush and
rename, in the middle of each file write (half of the bytes are on the disk), before each client's training. A first
child counts the points of a whole run; then one child per chosen point is killed there, and another child resumes.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tests import toy

from mllm_fl.engines import checkpoint, serial
from mllm_fl.engines.local import LocalConfig
from mllm_fl.runs import RunFolder
from mllm_fl.stages.federate import federate
from mllm_fl.stages.outcome import outcome
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import digest

CONFIG = FederateConfig(rounds=3, clients_per_round=2, evaluate_last=3, local=LocalConfig(epochs=1, batch_size=8))


class Points:
    """Counts points, and kills this process at number ``fatal``."""

    def __init__(self, fatal: int | None, tally: Path) -> None:
        self.count, self.fatal, self.tally = 0, fatal, tally
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.fatal:
            self.tally.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        real_fsync, real_replace, real_open = os.fsync, os.replace, builtins.open
        engine: Any = serial  # its client loop is one of the points
        real_train = engine.train_client

        def fsync(fd: Any) -> None:
            self("before fsync")
            real_fsync(fd)
            self("after fsync")

        def replace(a: Any, b: Any) -> None:
            self(f"before rename of {Path(b).name}")
            real_replace(a, b)
            self(f"after rename of {Path(b).name}")

        def halving_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            f: Any = real_open(path, mode, *args, **kwargs)
            if "w" in mode or "a" in mode:
                real_write = f.write

                def write(data: bytes) -> int:
                    real_write(data[: len(data) // 2])
                    f.flush()
                    self(f"inside write of {Path(str(path)).name.split('.tmp')[0]}")
                    return int(real_write(data[len(data) // 2 :]))

                f = _Wrapped(f, write)
            return f

        def train(*args: Any, **kwargs: Any) -> Any:
            self("before a client")
            return real_train(*args, **kwargs)

        os.fsync = fsync
        os.replace = replace  # type: ignore[assignment]
        builtins.open = halving_open  # type: ignore[assignment]
        engine.train_client = train


class _Wrapped:
    def __init__(self, f: Any, write: Any) -> None:
        self._f, self.write = f, write

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        self._f.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._f, name)


def play(folder: Path) -> None:
    """The run under test: the same call whether it starts or resumes."""
    torch.set_num_threads(1)
    fed = toy.federation()
    task, w = toy.task(fed)
    with RunFolder(folder, {"federate": {"rounds": 3}}) as run:
        state = federate(CONFIG, task, fed, w, run, batch_norm="local")
        from mllm_fl.data.longtail import groups

        final = outcome(CONFIG, task, state, fed.test, groups(fed.class_counts), run)
        final.pop("seconds")
        checkpoint.save_checkpoint(folder / "model.safetensors", state.w, {})
        run.write_json("final.json", final)


def child(folder: Path, fatal: int | None, tally: Path) -> int:
    """Play in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        points = Points(fatal, tally)
        points.arm()
        try:
            play(folder)
            if fatal is None:
                tally.write_text(json.dumps(points.names))
            os._exit(0)
        except BaseException as e:
            sys.stderr.write(f"{type(e).__name__}: {e}\n")
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def fingerprint(folder: Path) -> dict[str, str]:
    """What must be equal: weights and memory, rows, and the final record."""
    tensors, _ = checkpoint.load_checkpoint(folder / "checkpoint.safetensors")
    model, _ = checkpoint.load_checkpoint(folder / "model.safetensors")
    files = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest()
        for n in ("rounds.jsonl", "clients.jsonl", "final.json")
    }
    return {"checkpoint": digest(tensors), "model": digest(model), **files}


def main(root: Path) -> None:
    """Whole run, then killed and resumed runs; prints one JSON object."""
    tally = root / "tally"
    assert child(root / "whole", None, tally) == 0
    names = json.loads(tally.read_text())
    expected = fingerprint(root / "whole")
    inside = [i for i, n in enumerate(names, 1) if n == "inside write of .checkpoint.safetensors"]
    step = max(1, len(names) // 22)
    results = []
    for fatal in sorted({*range(1, len(names) + 1, step), *inside}):
        folder = root / f"killed-{fatal}"
        status = child(folder, fatal, tally)
        again = child(folder, None, root / "ignored")
        leftovers = sorted(p.name for p in folder.iterdir() if ".tmp" in p.name) if folder.exists() else []
        results.append(
            {
                "point": names[fatal - 1],
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "resumed": again == 0,
                "equal": again == 0 and fingerprint(folder) == expected,
                "leftovers": leftovers,
            }
        )
    print(json.dumps({"points": len(names), "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
