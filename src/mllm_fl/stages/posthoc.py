"""A post-hoc method on a finished federation: what CCVR and tau-norm do to the model that FedAvg ended with, without training it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllm_fl.algorithms.base import Algorithm, Server
from mllm_fl.config import Config, from_dict
from mllm_fl.data.longtail import groups
from mllm_fl.engines.base import open_engine
from mllm_fl.engines.checkpoint import GONE, fit, load_checkpoint
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.errors import UserError
from mllm_fl.events import Progress, silent
from mllm_fl.models.network import build_network
from mllm_fl.runs import RunFolder, config_hash, differences, environment, read_json
from mllm_fl.stages.measures import standing
from mllm_fl.stages.prepare import engine_of, task_of
from mllm_fl.stages.round import concluded
from mllm_fl.stages.saved import save_model
from mllm_fl.stages.shared import federation_of, run_path
from mllm_fl.toml import read_toml, to_dict
from mllm_fl.trees import clone, digest

ROUND_HOOKS = ("init", "broadcast", "begin", "objective", "correct", "finish", "server")
FREE = (
    "name",
    "experiment",
    "federate.algorithm",
    "federate.method.",
    "federate.server.",
    "federate.engine.",
    "teacher.",
)
"""Keys in which the configuration may differ from the finished run's: they say nothing about how its weights came about."""


def is_posthoc(method: type[Algorithm]) -> bool:
    """Whether the rounds of ``method`` are FedAvg's own, so that it needs nothing but FedAvg's last weights."""
    return all(getattr(method, hook) is getattr(Algorithm, hook) for hook in ROUND_HOOKS)


def from_finished(
    config: Config, source: Path, root: Path, progress: Progress = silent, command: str = ""
) -> dict[str, Any]:
    """Apply ``config.federate.method`` to the finished FedAvg run in ``source``; a run folder of its own, final.json's content returned.

    There are no rounds, hence no curve: ``mean_last``, ``max`` and ``ema`` are None, and ``from`` names the run and its weights.

    Raises:
        UserError: the method changes the rounds, the run is not finished, not FedAvg's, or was made with another configuration.
    """
    method = config.federate.method
    if not is_posthoc(type(method)):
        raise UserError(
            "--from",
            f"{config.federate.algorithm} changes the rounds themselves, a finished run is of no use to it",
            "run it without --from",
        )
    if not (source / "final.json").exists():
        raise UserError(source, "no finished run here (it has no final.json)", "finish it first: `mllm-fl federate`")
    before = read_json(source / "final.json")
    made = from_dict(read_toml(source / "config.toml"), str(source / "config.toml"))
    if made.federate.algorithm != "fedavg":
        raise UserError(source, f"its rounds were {made.federate.algorithm}'s", "name the folder of a FedAvg run")
    other = [d for d in differences(made.resolved(), config.resolved()) if not d.startswith(FREE)]
    if other:
        raise UserError(
            source, f"was made with another configuration: {'; '.join(other)}", "name the FedAvg run of the same file"
        )
    torch.set_num_threads(1)
    path = run_path(config, root)
    with RunFolder(path, config.resolved()) as folder:
        if folder.final is not None:
            return folder.final
        federation = federation_of(config)
        network = build_network(config.model, len(federation.class_names), config.seed)
        weights = source / "model.safetensors"
        w = fit(load_checkpoint(weights, GONE)[0], clone(network.state_dict()), weights)
        if digest(w) != before["weights_sha256"]:
            raise UserError(weights, "is not the model that the run's final.json describes", "run the federation again")
        settled = engine_of(config, path, federation, network)
        task = task_of(config, federation, network, settled)
        state = Server(w=w, round=before["rounds"])
        if method.concludes:
            fed = config.federate
            with open_engine(settled, task, fed.method, fed.local, config.model.batch_norm, folder.event) as engine:
                state = concluded(fed, task, federation, state, folder, engine, progress)
        survey = (
            read_json(path / "survey.json") if method.concludes else {"bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
        )
        deployed = method.deploy(task, state)
        scores = evaluate(task, deployed, federation.test)
        save_model(path / "model.safetensors", deployed, config, federation)
        final = before | {
            "experiment": config.experiment, "name": path.name, "arm": config.name, "config_hash": config_hash(config.resolved()),
            "algorithm": config.federate.algorithm, "method": to_dict(method), "mean_last": None, "max": None, "ema": None,
            "from": {"run": before["name"], "weights_sha256": before["weights_sha256"], "accuracy": before["last"]["accuracy"]},
            "last": scores.scores(groups(federation.class_counts)) | {"confusion": scores.counts.tolist()},
            "weights_sha256": digest(deployed), "uploads_beyond_weights": method.uploads, "bytes_up": before["bytes_up"] + survey["bytes_up"], "bytes_down": before["bytes_down"] + survey["bytes_down"],
            "seconds": before["seconds"] | {"server": before["seconds"]["server"] + survey["seconds"], "total": before["seconds"]["total"] + survey["seconds"]},
            "environment": environment(), "command": command,
        }  # fmt: skip
        final |= standing(final["last"], [], federation) | {
            "forgetting": None,
            "history": None,
            "chosen": None,
            "config": config.resolved(),
        }
        folder.write_json("final.json", final)
        folder.event("finished", source=str(source))
        return final
