"""Several runs at a time, each in a process of its own: arms and seeds of one plan.

What runs share (corpus, pretrained weights) is made by a job of its own, which the runs that need it wait for. A run that is
killed or fails stops the plan; the same command takes it up again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_fl.config import Config
from mllm_fl.console import Screen
from mllm_fl.engines.cores import RUNS
from mllm_fl.errors import UserError
from mllm_fl.events import Event
from mllm_fl.runs import read_json
from mllm_fl.stages import chain


@dataclass
class _Job:
    label: str
    argv: list[str]
    waits_for: Path | None = None  # a folder another job makes
    makes: Path | None = None
    process: subprocess.Popen[str] | None = None
    errors: list[str] = field(default_factory=list)


def run_jobs(
    path: Path, configs: Sequence[Config], root: Path, rest: list[str], at_a_time: int, screen: Screen
) -> list[dict[str, Any] | None]:
    """Run all configurations, ``at_a_time`` processes together; returns their final.json contents in order.

    Raises:
        UserError: the first job that failed, in its own words; the others are stopped (and resume later).
    """
    waiting = _plan(path, configs, root, rest)
    running: list[_Job] = []
    made: set[Path] = set()
    try:
        while waiting or running:
            for job in [j for j in running if j.process is not None and j.process.poll() is not None]:
                running.remove(job)
                assert job.process is not None
                if job.process.returncode != 0:
                    why = next((e.removeprefix("mllm-fl: ") for e in reversed(job.errors) if e.strip()), "no message")
                    raise UserError(
                        job.label,
                        f"stopped with status {job.process.returncode}: {why}",
                        "the same command resumes the rest",
                    )
                if job.makes:
                    made.add(job.makes)
            for job in [j for j in waiting if j.waits_for is None or j.waits_for in made][: at_a_time - len(running)]:
                waiting.remove(job)
                running.append(job)
                _start(job, screen, min(at_a_time, len(configs)))
            time.sleep(0.05)
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
        for job in running:
            if job.process is not None:
                job.process.wait()
    return [read_json(chain.run_path(c, root) / "final.json") for c in configs]


def _plan(path: Path, configs: Sequence[Config], root: Path, rest: list[str]) -> list[_Job]:
    first: dict[Path, _Job] = {}
    runs: list[_Job] = []
    for c in configs:
        base = [str(path), "--runs", str(root), "--arm", c.name, "--seed", str(c.seed), "--json-progress", *rest]
        waits = None
        if c.pretrain is not None:
            waits = chain.pretrain_path(c, root)
            if waits not in first:
                corpus = chain.corpus_path(c, root)
                ready = c.pretrain.corpus is not None
                sibling = next((j.makes for j in first.values() if j.waits_for == corpus or j.makes == corpus), None)
                if sibling is None and not ready:
                    first[corpus] = _Job("corpus", ["annotate", *base], makes=corpus)
                first[waits] = _Job(
                    f"pretraining seed {c.seed}", ["pretrain", *base], waits_for=None if ready else corpus, makes=waits
                )
        runs.append(_Job(f"{c.name} seed {c.seed}", ["run", *base], waits_for=waits))
    return list(first.values()) + runs


def _start(job: _Job, screen: Screen, runs: int) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", RUNS: str(runs)}  # each takes its share of the cores
    job.process = subprocess.Popen(
        [sys.executable, "-m", "mllm_fl.cli", *job.argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    threading.Thread(target=_relay, args=(job, screen), daemon=True).start()
    threading.Thread(target=_errors, args=(job,), daemon=True).start()


def _relay(job: _Job, screen: Screen) -> None:
    assert job.process is not None and job.process.stdout is not None
    for line in job.process.stdout:
        try:
            fields = json.loads(line)
            screen.draw(job.label, Event(fields["stage"], fields["done"], fields["total"], fields["note"]))
        except (ValueError, KeyError):
            continue


def _errors(job: _Job) -> None:
    assert job.process is not None and job.process.stderr is not None
    job.errors.extend(line.rstrip() for line in job.process.stderr)
