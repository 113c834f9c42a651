"""What a run needs before its first round: engine settings, the task with what the server owns, the teacher, D_align with its q."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mllm_fl.algorithms.base import Task
from mllm_fl.config import Config
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import possible
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.probe import chosen
from mllm_fl.models.network import Network
from mllm_fl.models.teacher.clip import load_teacher
from mllm_fl.models.teacher.logits import teacher_logits
from mllm_fl.runs import read_json
from mllm_fl.stages.align import AlignConfig, Aligner, ZeroShot, make_aligner
from mllm_fl.stages.alignment_images import alignment_set
from mllm_fl.stages.server import unlabelled_images
from mllm_fl.stages.shared import side_of


def engine_of(config: Config, folder: Path, federation: Federation, network: Network) -> EngineConfig:
    """``[federate.engine]`` with every "auto" decided: as the run in ``folder`` was begun, else by the probe of this chip.

    Raises:
        UserError: this machine lacks what the engine needs.
    """
    possible(config.federate.engine)
    begun = read_json(folder / "env.json").get("engine", {}) if (folder / "env.json").exists() else {}
    return chosen(config.federate.engine, network, side_of(federation), config.federate.local.batch_size, begun)


def task_of(config: Config, federation: Federation, network: Network, engine: EngineConfig) -> Task:
    """What is learned, with the server's images and the teacher's text embeddings where the method needs them."""
    needs, server = config.federate.method.needs, config.federate.server
    unlabelled = unlabelled_images(server, config.data, federation) if "unlabelled" in needs else None
    labelled = None
    if "labelled" in needs:
        balanced_set = AlignConfig(source=server.labelled, per_class=server.labelled_per_class, seed=server.seed)
        labelled = alignment_set(balanced_set, federation, config.data)
    texts = None
    if "texts" in needs:
        texts = load_teacher(config.teacher).class_embeddings(federation.class_names)
    return Task(
        network, federation.class_names, federation.population, config.seed, unlabelled, labelled, texts,
        "bf16" if engine.precision == "bf16" else "fp32", engine.layout == "channels_last",
    )  # fmt: skip


def teacher_of(config: Config, federation: Federation, cache: Path) -> ZeroShot:
    """What [teacher] answers about images of the federation's classes: zero-shot logits, kept in ``cache``; loaded when it is asked."""
    return lambda images: teacher_logits(load_teacher(config.teacher), images, federation.class_names, cache)


def aligner_of(config: Config, federation: Federation, images: ImageSet | None, cache: Path) -> Aligner | None:
    """Stage 3 made ready: D_align's ``images`` and the teacher's zero-shot logits on them, kept in ``cache``; None when [align] is off."""
    if config.align is None or images is None:
        return None
    if not config.align.asks_teacher:
        return make_aligner(config.align, images, None)
    clip = load_teacher(config.teacher)
    aligner = make_aligner(config.align, images, lambda x: teacher_logits(clip, x, federation.class_names, cache))
    return dataclasses.replace(aligner, teacher=clip.record(), limit=config.federate.limit)
