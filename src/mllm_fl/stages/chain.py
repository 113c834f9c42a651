"""The three stages, chained: what ``mllm-fl run`` does for one configuration.

What arms and seeds have in common is done once: the corpus and the pretrained weights lie in folders named by the hash of
what they depend on, beside the runs that use them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mllm_fl.algorithms.base import Shard, Task
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.config import Config
from mllm_fl.data.check import known, leaks
from mllm_fl.data.describe import summary
from mllm_fl.data.federation import Federation
from mllm_fl.data.federation import build as build_federation
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import groups
from mllm_fl.data.manifest import load as load_manifest
from mllm_fl.data.manifest import save as save_manifest
from mllm_fl.engines.base import Engine, open_engine
from mllm_fl.engines.checkpoint import fit, load_checkpoint, save_checkpoint
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.device import described
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.probe import chosen
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.network import Network, build_network
from mllm_fl.models.teacher.clip import load_teacher
from mllm_fl.models.teacher.logits import teacher_logits
from mllm_fl.runs import RunFolder, config_hash, differences, environment, read_json, read_rows
from mllm_fl.stages.align import AlignConfig, Aligner, ZeroShot, delivered, make_aligner
from mllm_fl.stages.alignment_images import alignment_set, dealt
from mllm_fl.stages.alignment_images import record as d_align
from mllm_fl.stages.annotate import annotate, corpus_prints, open_prints
from mllm_fl.stages.federate import federate, outcome
from mllm_fl.stages.measures import overhead, standing
from mllm_fl.stages.pretrain import pretrain
from mllm_fl.stages.server import clients_logits, unlabelled_images
from mllm_fl.stages.validation import chosen as chosen_by
from mllm_fl.stages.validation import held_out
from mllm_fl.toml import to_dict
from mllm_fl.trees import Tree, clone, digest


def run_path(config: Config, root: Path) -> Path:
    """``root/experiment/name-hash``, the folder of this configuration's run."""
    return root / config.experiment / f"{config.name}-{config_hash(config.resolved())}"


def corpus_path(config: Config, root: Path) -> Path:
    """The folder of the corpus that this configuration annotates; equal for runs that ask for equal corpora."""
    assert config.annotate is not None
    return root / config.experiment / f"corpus-{config_hash(config.annotate.named_by())}"


def pretrain_path(config: Config, root: Path) -> Path:
    """The folder of the pretrained weights; equal for runs that pretrain equally from equal corpora and seeds."""
    assert config.pretrain is not None
    depends = {
        "pretrain": to_dict(config.pretrain), "annotate": config.annotate.named_by() if config.annotate else None,
        "model": to_dict(config.model), "seed": config.seed, "data": config.data.source, "size": config.data.image_size,
    }  # fmt: skip
    return root / config.experiment / f"pretrain-{config_hash(depends)}"


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
        _check_leaks(config, {"open/test": open_leaks(config, root, known(federation_of(config).test))})
    corpus = annotate_stage(config, root, progress)
    network = _network(config)
    return pretrain(
        config.pretrain, network, corpus, pretrain_path(config, root),
        seed=config.seed, mean=train.mean, std=train.std, side=_side(federation_of(config)), progress=progress,
    )  # fmt: skip


def _network(config: Config) -> Network:
    classes = len(_class_names(config))
    return build_network(config.model, classes, config.seed)


def _class_names(config: Config) -> tuple[str, ...]:
    return federation_of(config).class_names


_federations: dict[str, Federation] = {}


def federation_of(config: Config) -> Federation:
    """The federation of [data]; built once per process for equal tables."""
    key = config_hash(to_dict(config.data))
    if key not in _federations:
        _federations.clear()
        _federations[key] = build_federation(config.data)
    return _federations[key]


def adopt(config: Config, federation: Federation) -> None:
    """Use this federation for the configuration's [data] from now on: the clients' images are elsewhere and cannot be built from it."""
    _federations.clear()
    _federations[config_hash(to_dict(config.data))] = federation


def open_leaks(config: Config, root: Path, test: frozenset[str]) -> int:
    """How many open images are test images: of the source, or of the finished corpus when the source is gone."""
    if config.annotate is None:
        return 0  # refused by annotate_stage
    size = _side(federation_of(config))
    found = open_prints(config.annotate, size)
    if found is None:
        path = corpus_path(config, root)
        found = corpus_prints(Corpus.open(path), size) if (path / "records.json").exists() else []
    return leaks(found, test)


def _side(federation: Federation) -> int:
    """Pixels a side of the images that clients train on."""
    return int(federation.test.read([0]).shape[-1])


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


def engine_of(config: Config, folder: Path, federation: Federation, network: Network) -> EngineConfig:
    """``[federate.engine]`` with every "auto" decided: as the run in ``folder`` was begun, else by the probe of this chip."""
    begun = read_json(folder / "env.json").get("engine", {}) if (folder / "env.json").exists() else {}
    return chosen(config.federate.engine, network, _side(federation), config.federate.local.batch_size, begun)


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
        network = _network(config)
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
        with (opened or open_engine)(settled, task, fed.method, fed.local, config.model.batch_norm, folder.event) as engine:
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
            "teacher": _teacher_record(config, aligner), "pretrained": _pretrained_record(config, root),
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


def _pretrained_record(config: Config, root: Path) -> dict[str, Any] | None:
    """Which teacher and corpus the initial weights came from; None without pretraining."""
    if config.pretrain is None:
        return None
    made = read_json(pretrain_path(config, root) / "pretrain.json")
    return {"teacher": made["teacher"], "corpus": made["what"]["corpus"], "weights_sha256": made["weights_sha256"]}


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


def align_finished(
    config: Config, root: Path, progress: Progress = silent, run: Path | None = None
) -> dict[str, Any]:
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
        network = _network(config)
        w = fit(load_checkpoint(path / "model.safetensors")[0], clone(network.state_dict()), path / "model.safetensors")
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
        final |= {
            "weights_sha256": digest(aligned), "accuracy_before_align": final["last"]["accuracy"],
            "stages": final["stages"] | {"align": True}, "leaks": final["leaks"] | found,
            "arm": f"{config.name}, aligned once", "before_align": final["last"], "mean_last": None, "max": None, "ema": None,
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


def leaks_of(config: Config, root: Path, federation: Federation, sets: Mapping[str, ImageSet | None]) -> dict[str, int]:
    """Test images among each set, and among the open images if the run pretrains: ``{"align/test": 0, ...}``.

    Raises:
        UserError: more than ``data.leaks_declared``.
    """
    test = known(federation.test)
    found = {f"{name}/test": leaks(images, test) for name, images in sets.items() if images is not None}
    if config.pretrain is not None:
        found["open/test"] = open_leaks(config, root, test)
    _check_leaks(config, found)
    return found


def _check_leaks(config: Config, found: dict[str, int]) -> None:
    total = sum(found.values())
    if total > config.data.leaks_declared:
        raise UserError(
            "data.leaks_declared",
            f"{total} images are also in the test set ({', '.join(f'{k}: {v}' for k, v in found.items())})",
            f"remove them, or declare them: data.leaks_declared = {total}",
        )


def stage_one_seconds(config: Config, root: Path) -> dict[str, float]:
    """What the corpus and the pretraining that this run used have cost, from their own records, shared or resumed or not."""
    card, made = stage_one_records(config, root)
    if card is None or made is None:
        return {}
    return {"annotate": sum(float(k["seconds"]) for k in card["kinds"].values()), "pretrain": float(made["seconds"])}


def stage_one_records(config: Config, root: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The card of the corpus and the record of the pretraining that this run used; None without stage 1."""
    if config.pretrain is None:
        return None, None
    return read_json(corpus_path(config, root) / "card.json"), read_json(pretrain_path(config, root) / "pretrain.json")


def save_model(path: Path, w: Tree, config: Config, federation: Federation) -> None:
    """The deployable model: weights, and beside them all that is needed to use them (classes in order, normalisation, network)."""
    size = list(federation.test.read([0]).shape[-2:])
    record = {
        "class_names": list(federation.class_names), "mean": list(federation.train.mean), "std": list(federation.train.std),
        "image_size": size, "model": to_dict(config.model),
    }  # fmt: skip
    save_checkpoint(path, w, record)


def load_model(path: Path) -> tuple[Network, dict[str, Any]]:
    """A network in evaluation mode from ``model.safetensors``, and its record (class names, normalisation, image size)."""
    from mllm_fl.models.network import ModelConfig

    tensors, record = load_checkpoint(path)
    network = build_network(ModelConfig(**record["model"]), len(record["class_names"]), 0)
    network.load_state_dict(fit(tensors, clone(network.state_dict()), path))
    return network.eval(), record
