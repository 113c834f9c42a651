"""Stage 1 of a configuration: its corpus and its pretrained weights, made once for all runs that share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllm_fl.config import Config
from mllm_fl.data.check import known
from mllm_fl.errors import UserError
from mllm_fl.events import Progress, silent
from mllm_fl.models.teacher.clip import load_teacher
from mllm_fl.runs import read_json
from mllm_fl.stages.annotate import annotate
from mllm_fl.stages.overlap import check_leaks, open_leaks
from mllm_fl.stages.pretrain import pretrain
from mllm_fl.stages.pretraining.handover import text_classifier
from mllm_fl.stages.shared import corpus_path, federation_of, network_of, pretrain_path, side_of
from mllm_fl.trees import Tree


def annotate_stage(
    config: Config, root: Path, progress: Progress = silent, *, retry: bool = False, wait: bool = True
) -> Path:
    """Stage 1a: make (or find) the corpus; returns its folder. ``retry`` and ``wait``: see :func:`annotate`."""
    if config.annotate is None:
        raise UserError("annotate", "no [annotate] table", "add [annotate], or leave [pretrain] out")
    torch.set_num_threads(1)  # the same bytes whichever verb makes them
    path = corpus_path(config, root)
    annotate(config.annotate, path, progress, retry=retry, wait=wait)
    return path


def pretrain_stage(config: Config, root: Path, progress: Progress = silent, *, checked: bool = False) -> Tree:
    """Stage 1b: the compact network's weights after pretraining on the corpus (backbone and adapter; a fresh classifier).

    Unless they were ``checked``, the open images are held against the test images first, before anybody is asked about them.
    """
    assert config.pretrain is not None
    train = federation_of(config).train
    if not checked:
        check_leaks(config, {"open/test": open_leaks(config, root, known(federation_of(config).test))})
    ready = config.pretrain.corpus is not None
    corpus = corpus_path(config, root) if ready else annotate_stage(config, root, progress)
    network = network_of(config)
    words = None
    if config.pretrain.classifier == "text":
        words = text_classifier(load_teacher(config.teacher), federation_of(config).class_names, network)
    torch.set_num_threads(1)
    return pretrain(
        config.pretrain, network, corpus, pretrain_path(config, root), classifier=words,
        seed=config.seed, mean=train.mean, std=train.std, side=side_of(federation_of(config)), progress=progress,
    )  # fmt: skip


def stage_one_seconds(config: Config, root: Path) -> dict[str, float]:
    """What the corpus and the pretraining that this run used have cost, from their own records, shared or resumed or not."""
    card, made = stage_one_records(config, root)
    if card is None or made is None:
        return {}
    kinds = card.get("kinds", {}).values()
    return {"annotate": sum(float(k.get("seconds") or 0) for k in kinds), "pretrain": float(made["seconds"])}


def stage_one_records(config: Config, root: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The card of the corpus ({} for one without) and the record of the pretraining that this run used; None without stage 1."""
    if config.pretrain is None:
        return None, None
    card = corpus_path(config, root) / "card.json"
    return read_json(card) if card.exists() else {}, read_json(pretrain_path(config, root) / "pretrain.json")


def pretrained_record(config: Config, root: Path) -> dict[str, Any] | None:
    """Which teacher and corpus the initial weights came from, and how many of its wanted pictures it has; None without pretraining."""
    if config.pretrain is None:
        return None
    card, made = stage_one_records(config, root)
    assert made is not None
    came = {"teacher": made["teacher"], "corpus": made["what"]["corpus"], "weights_sha256": made["weights_sha256"]}
    return came | ({"coverage": card["coverage"]} if card and card.get("coverage") else {})
