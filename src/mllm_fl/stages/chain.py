"""The three stages, chained: what ``mllm-fl run`` does for one configuration.

What arms and seeds have in common is done once: the corpus and the pretrained weights lie in folders named by the hash of
what they depend on, beside the runs that use them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mllm_fl.algorithms.base import Shard
from mllm_fl.config import Config
from mllm_fl.data.describe import summary
from mllm_fl.data.federation import Federation
from mllm_fl.data.longtail import groups
from mllm_fl.data.manifest import load as load_manifest
from mllm_fl.data.manifest import save as save_manifest
from mllm_fl.engines.base import Engine, open_engine
from mllm_fl.engines.checkpoint import GONE, fit, load_checkpoint
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.device import described
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.teacher.clip import load_teacher
from mllm_fl.runs import RunFolder, config_hash, differences, environment, read_json, read_rows
from mllm_fl.stages.align import Aligner, delivered
from mllm_fl.stages.alignment_images import alignment_set, dealt
from mllm_fl.stages.alignment_images import record as d_align
from mllm_fl.stages.federate import federate
from mllm_fl.stages.measures import overhead, standing
from mllm_fl.stages.outcome import outcome
from mllm_fl.stages.overlap import leaks_of, open_leaks
from mllm_fl.stages.prepare import aligner_of, engine_of, task_of, teacher_of
from mllm_fl.stages.saved import load_model, save_model
from mllm_fl.stages.server import clients_logits
from mllm_fl.stages.shared import adopt, corpus_path, federation_of, network_of, pretrain_path, run_path
from mllm_fl.stages.stage_one import (
    annotate_stage,
    pretrain_stage,
    pretrained_record,
    stage_one_records,
    stage_one_seconds,
)
from mllm_fl.stages.validation import chosen as chosen_by
from mllm_fl.stages.validation import held_out
from mllm_fl.toml import to_dict
from mllm_fl.trees import Tree, clone, digest

__all__ = [
    "adopt", "align_finished", "aligner_of", "annotate_stage", "corpus_path", "federation_of", "leaks_of", "load_model",
    "open_leaks", "pretrain_path", "pretrain_stage", "run", "run_path", "save_model", "task_of",
]  # fmt: skip


def run(
    config: Config,
    root: Path,
    *,
    progress: Progress = silent,
    command: str = "",
    opened: Callable[..., Engine] | None = None,
) -> dict[str, Any]:
    """All stages of one configuration; returns final.json's content, from the folder when the run is already finished.

    ``opened``: makes the engine in place of :func:`open_engine`, for clients that are on other machines and see their images and teacher there.

    Raises:
        UserError: bad input of any kind; test images in D_align beyond ``data.leaks_declared``.
    """
    torch.set_num_threads(1)
    path = run_path(config, root)
    with RunFolder(path, config.resolved()) as folder:
        if folder.final is not None:
            return folder.final
        federation = federation_of(config)
        network = network_of(config)
        settled = engine_of(config, path, federation, network)
        task = task_of(config, federation, network, settled)
        cache = root / config.experiment / "logits"
        zero_shot = teacher_of(config, federation, cache)
        aligned_on = None
        if config.align is not None:
            aligned_on = alignment_set(config.align, federation, config.data, zero_shot)
        wanted, validation = config.federate.validation_per_class, None
        if wanted is not None:
            validation = held_out(federation, wanted, (aligned_on, task.unlabelled, task.labelled), config.data.seed)
        sets = {
            "train": federation.subset,
            "align": aligned_on,
            "validation": validation,
            "unlabelled": task.unlabelled,
            "labelled": task.labelled,
        }
        found = leaks_of(config, root, federation, sets)  # before anything is paid for
        to_clients = config.align is not None and config.align.control == "clients"
        if to_clients and aligned_on is not None:
            federation = dealt(federation, aligned_on)
            task = dataclasses.replace(task, population=federation.population)
        w: Tree = clone(network.state_dict())
        if config.pretrain is not None:
            w = fit(pretrain_stage(config, root, progress, checked=True), w, pretrain_path(config, root))
        aligner = None if to_clients else aligner_of(config, federation, aligned_on, cache)
        if aligned_on is not None:
            progress(Event("prepare", 1, 1, f"{len(aligned_on)} alignment images"))
        teacher = None
        if "teacher" in config.federate.method.needs and opened is None:
            progress(Event("prepare", 0, 1, "the teacher's logits on the clients' images"))
            teacher = clients_logits(config.teacher, federation, cache)
        _begin(folder, federation, settled, command)
        found_groups, fed = groups(federation.class_counts), config.federate
        with (opened or open_engine)(
            settled, task, fed.method, fed.local, config.model.batch_norm, folder.event
        ) as engine:
            state = federate(
                fed, task, federation, w, folder,
                batch_norm=config.model.batch_norm, aligner=aligner, teacher=teacher, progress=progress, engine=engine,
                validation=validation,
            )  # fmt: skip
            start = time.perf_counter()
            shipped = delivered(fed.method, task, state, aligner)
            seconds = time.perf_counter() - start
            final = outcome(fed, task, state, federation.test, found_groups, folder, aligner, engine, shipped)
            final["seconds"]["align"] += seconds if aligner is not None else 0.0
        save_model(path / "model.safetensors", shipped, config, federation)
        final = {
            "experiment": config.experiment, "name": path.name, "arm": config.name, "seed": config.seed,
            "config_hash": config_hash(config.resolved()), "class_counts": federation.class_counts,
            "groups": to_dict(found_groups), "stages": {"pretrain": config.pretrain is not None, "align": aligner is not None},
            "align": None if aligned_on is None or config.align is None else d_align(config.align, aligned_on, aligner),
            "manifest_sha256": federation.manifest.sha256, "leaks": found, "command": command,
            "environment": environment() | getattr(engine, "record", {}) | {"engine": to_dict(settled)},
            "teacher": _teacher_record(config, aligner), "pretrained": pretrained_record(config, root),
            "environment_changes": [e["changes"] for e in read_rows(path / "events.jsonl") if e["event"] == "environment changed"],
            **final, "config": config.resolved(),
        }  # fmt: skip
        final["seconds"] |= stage_one_seconds(config, root)
        final["seconds"]["total"] = sum(final["seconds"].values())
        rows = {name: read_rows(path / f"{name}.jsonl") for name in ("rounds", "clients", "timings")}
        final |= standing(final["last"], rows["rounds"], federation) | {"chosen": chosen_by(rows["rounds"], validation)}
        first = next(k for k, held in enumerate(federation.clients) if held)
        shard = Shard(first, state.round + 1, federation.client(first), config.seed, (teacher or {}).get(first))
        card, made = stage_one_records(config, root)
        final["overhead"] = overhead(
            fed, task, federation, state, rows,
            batch_norm=config.model.batch_norm, aligner=aligner, shard=shard, card=card, pretrained=made,
        )  # fmt: skip
        folder.write_json("final.json", final)
        folder.event("finished")
        return final


def _teacher_record(config: Config, aligner: Aligner | None) -> dict[str, Any] | None:
    """The CLIP that gave q to the alignment, or logits or embeddings to the method; None where neither asked one."""
    if aligner is not None and aligner.teacher is not None:
        return dict(aligner.teacher)
    return load_teacher(config.teacher).record() if {"texts", "teacher"} & set(config.federate.method.needs) else None


def _begin(folder: RunFolder, federation: Federation, engine: EngineConfig, command: str) -> None:
    """Write manifest, federation and environment; in a folder that has them, hold the present ones against them.

    Another federation is refused. Another environment is not (an interrupted run may have to end after an update), but an event says
    what changed, and final.json repeats it: env.json stays that of the beginning.

    Raises:
        UserError: the run was begun with another federation; names what differs.
    """
    path = folder.path / "manifest.json"
    if path.exists():
        there, here = load_manifest(path), federation.manifest
        other = [f.name for f in dataclasses.fields(there) if getattr(there, f.name) != getattr(here, f.name)]
        if other:
            problem = f"the run was begun with another federation: {', '.join(other)} differ"
            raise UserError(path, problem, "restore the data set, or delete the run folder")
    else:
        save_manifest(federation.manifest, path)
    folder.write_json("federation.json", summary(federation))
    now = environment() | described(engine) | {"engine": to_dict(engine)}
    if (folder.path / "env.json").exists():
        then = read_json(folder.path / "env.json")
        changes = differences({k: v for k, v in then.items() if k != "command"}, now)
        if changes:
            folder.event("environment changed", changes=changes)
    else:
        folder.write_json("env.json", now | {"command": command})


def align_finished(config: Config, root: Path, progress: Progress = silent, run: Path | None = None) -> dict[str, Any]:
    """Stage 3 alone: align the model of a finished ``federate`` once; writes aligned.safetensors and aligned.json beside it.

    ``run``: its folder; absent means where the same configuration without [align] puts it.

    Returns the run's final.json content with the aligned model's scores as ``last`` and the old ones as ``before_align``.

    Raises:
        UserError: no [align] table, or the run has not finished.
    """
    if config.align is None:
        raise UserError("align", "the configuration has no [align] table", "add it, or an arm that has it: --arm NAME")
    if config.align.control in ("alone", "clients"):
        raise UserError("align.control", f"{config.align.control!r} changes the rounds themselves", "use `mllm-fl run`")
    torch.set_num_threads(1)
    plain = dataclasses.replace(config, align=None)
    path = run or run_path(plain, root)
    if not (path / "final.json").exists():
        raise UserError(path, "no finished federation here", "run `mllm-fl federate` with the same configuration first")
    with RunFolder(path, plain.resolved()) as folder:
        federation = federation_of(config)
        network = network_of(config)
        w = fit(
            load_checkpoint(path / "model.safetensors", GONE)[0],
            clone(network.state_dict()),
            path / "model.safetensors",
        )
        task = task_of(config, federation, network, engine_of(config, path, federation, network))
        cache = path.parent / "logits"
        images = alignment_set(config.align, federation, config.data, teacher_of(config, federation, cache))
        found = leaks_of(dataclasses.replace(config, pretrain=None), root, federation, {"align": images})
        aligner = aligner_of(config, federation, images, cache)
        assert aligner is not None
        aligned, loss = aligner(task, w, config.federate.rounds)
        progress(Event("align", 1, 1, f"loss {loss:.3f}"))
        scores = evaluate(task, aligned, federation.test)
        save_model(path / "aligned.safetensors", aligned, config, federation)
        final = folder.final
        assert final is not None
        part = f" ({config.align.control})" if config.align.control else ""
        final |= {
            "weights_sha256": digest(aligned), "accuracy_before_align": final["last"]["accuracy"],
            "stages": final["stages"] | {"align": True}, "leaks": final["leaks"] | found,
            "arm": f"{config.name}, aligned once{part}", "before_align": final["last"], "mean_last": None, "max": None, "ema": None,
            "last": scores.scores(groups(federation.class_counts)) | {"confusion": scores.counts.tolist()},
            "align": to_dict(config.align) | d_align(config.align, images, aligner), "teacher": _teacher_record(config, aligner),
        }  # fmt: skip
        final |= standing(final["last"], [], federation) | {
            "forgetting": None,
            "history": None,
            "config": config.resolved(),
        }
        folder.write_json("aligned.json", final)
        return final
