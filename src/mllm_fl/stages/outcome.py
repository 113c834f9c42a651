"""The numbers that a finished federation is quoted with."""

from __future__ import annotations

from typing import Any

import torch

from mllm_fl.algorithms.base import Server, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import Groups
from mllm_fl.engines.base import Engine
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.metrics import Evaluation, summarise
from mllm_fl.runs import RunFolder, read_json, read_rows
from mllm_fl.stages.align import Aligner, delivered
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import Tree, digest


def outcome(
    config: FederateConfig,
    task: Task,
    state: Server,
    test: ImageSet,
    groups: Groups,
    run: RunFolder,
    aligner: Aligner | None = None,
    engine: Engine | None = None,
    shipped: Tree | None = None,
) -> dict[str, Any]:
    """The numbers of a finished run, for final.json: last, mean of the last ``report_last`` rounds, maximum, EMA, bytes, seconds.

    ``last`` is the model that is ``shipped``, by default :func:`mllm_fl.stages.align.delivered`. ``curve`` says which models the other three describe: "plain", "aligned", or "unaligned" where
    the model was aligned once after the last round. ``deployed_otherwise``: leaves in which the shipped model is not the one that
    is broadcast, because the method deploys its own in their place or transforms them; they are aligned too.
    """
    rows, timings = read_rows(run.path / "rounds.jsonl"), read_rows(run.path / "timings.jsonl")
    plain = config.method.deploy(task, state)
    deployed = shipped if shipped is not None else delivered(config.method, task, state, aligner)
    once = aligner is not None and aligner.config.when == "end"

    def score(w: Tree) -> Evaluation:
        return engine.evaluate(w, test) if engine is not None else evaluate(task, w, test)

    confusion = score(deployed)
    surveyed = read_json(run.path / "survey.json") if config.method.concludes else {}
    seconds = {
        name: sum(r.get(f"{key}_seconds", r["client_seconds"]) for r in timings)
        for name, key in (("clients", "waited"), ("server", "server"), ("align", "align"), ("evaluate", "eval"))
    }
    seconds["server"] += surveyed.get("seconds", 0.0)
    return {
        "algorithm": config.algorithm,
        "rounds": config.rounds,
        "class_names": list(task.class_names),
        "last": confusion.scores(groups) | {"confusion": confusion.counts.tolist()},
        **summarise([(r["round"], r["accuracy"]) for r in rows if r["accuracy"] is not None], last=config.report_last),
        "curve": "plain" if aligner is None else "unaligned" if once else "aligned",
        "deployed_otherwise": [k for k, v in plain.items() if k not in state.w or not torch.equal(v, state.w[k])],
        "accuracy_before_align": score(plain).scores(None)["accuracy"] if once else rows[-1]["accuracy_before_align"],
        "bytes_up": sum(r["bytes_up"] for r in rows) + surveyed.get("bytes_up", 0),
        "bytes_down": sum(r["bytes_down"] for r in rows) + surveyed.get("bytes_down", 0),
        "rejected": sum(r["rejected"] for r in rows),
        "seconds": seconds,
        "method": vars(config.method) | {},
        "weights_sha256": digest(deployed),
        "uploads_beyond_weights": type(config.method).uploads,
    }
