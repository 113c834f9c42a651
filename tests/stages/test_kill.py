"""Killed at any moment, the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_sigkill_anywhere_then_resume_gives_equal_bytes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.kill_script", str(tmp_path)],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    results = report["results"]
    assert len(results) >= 20
    assert all(r["killed"] for r in results)
    assert sum(r["point"] == "inside write of .checkpoint.safetensors" for r in results) == 3  # one save a round
    assert {p.split(" of ")[-1] for p in (r["point"] for r in results)} >= {"rounds.jsonl", ".checkpoint.safetensors"}
    broken = [r for r in results if not r["equal"]]
    assert not broken, broken
    assert not [r for r in results if r["leftovers"]]
