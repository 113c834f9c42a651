"""One pretraining of stage 1b: the corpus as a stream, the checks before, the steps, what is written at the end."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_fl.atomic import write_atomic
from mllm_fl.engines.checkpoint import save_checkpoint
from mllm_fl.engines.flops import counted
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress
from mllm_fl.models.network import Network
from mllm_fl.models.teacher.conversation import shown
from mllm_fl.models.teacher.llava import Blueprint, LlavaTeacher, load_llava
from mllm_fl.stages.pretraining import preflight
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.learner import Learner
from mllm_fl.stages.pretraining.parallel import World, plain_batch_norm, shard_layers
from mllm_fl.stages.pretraining.samples import Batch, Stream, make_index, open_index
from mllm_fl.stages.pretraining.schedules import alpha_at, lr_at
from mllm_fl.stages.pretraining.store import Store
from mllm_fl.trees import Tree, clone, digest

CACHE_LIMIT = 256 << 20  # bytes of CLIP features that are kept
Rgb = tuple[float, float, float]


def device_of(config: PretrainConfig) -> str:
    """ "cpu" or "cuda", as ``pretrain.device`` and this machine say."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("pretrain.device", "torch finds no CUDA device here", 'use device = "cpu", or a build of torch with CUDA')  # fmt: skip
    return config.device


class Run:
    """One pretraining: the stream, the checks before, the steps, what is written at the end."""

    def __init__(
        self,
        config: PretrainConfig,
        network: Network,
        corpus: Path,
        plan: Blueprint,
        folder: Path,
        seed: int,
        what: dict[str, Any],
        world: World,
        progress: Progress,
    ) -> None:
        self.config, self.network, self.plan, self.folder, self.what, self.world = (
            config, network, plan, folder, what, world,
        )  # fmt: skip
        self.progress, self.store, self.seconds = progress, Store(folder, what), 0.0
        lm = config.objective == "lm"
        file = folder / "index.arrow"
        if world.first:
            self.store.clean()
            make_index(corpus, file, plan, config.max_tokens, config.form, lm, progress)
        world.barrier()
        self.stream = Stream(
            open_index(corpus, file), plan, (config.image_size, plan.place.side),
            seed=seed, pictures_only=not lm, max_tokens=config.max_tokens, form=config.form,
        )  # fmt: skip
        n = len(self.stream)
        self.steps = config.steps if config.epochs is None else max(1, round(config.epochs * n / config.batch_size))
        self.half = config.precision == "bf16" or (config.precision == "auto" and device_of(config) == "cuda")
        self.record = self._preflight()
        self.z: Tensor | None = None
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    def _preflight(self) -> dict[str, Any]:
        """What is known before any weight is loaded; in preflight.json for the user's eyes."""
        c, tokens, lm = self.config, self.stream.index.column("tokens"), self.config.objective == "lm"
        share = self.world.share_of(c.batch_size)
        asked = self.world.share_of(c.lm_samples if c.lm_samples is not None else c.batch_size)
        sample = self.stream.sample(0) if lm else None
        longest = int(tokens.max()) if len(tokens) else 0
        memory = preflight.estimate(
            self.plan, self.network, side=self.stream.sizes[0], share=share, part=max(min(c.micro_batch or asked, asked), 1),
            tokens=longest, predicted=longest - self.plan.place.tokens, half=self.half, checkpointing=c.gradient_checkpointing,
            skip_lm=not lm, processes=self.world.size, shard=c.shard,
        )  # fmt: skip
        place = self.plan.place
        record = {
            "teacher": {"name": self.plan.name, "family": self.plan.config.model_type, "grid": place.grid, "width": place.width, "image_tokens": place.tokens},
            "image_size": self.stream.sizes[0], "samples": len(self.stream), "images": self.stream.pictures, "longest": longest,
            "steps": self.steps, "sample": shown(self.plan, sample) if sample is not None else None, "memory": memory,
        }  # fmt: skip
        if self.world.first:
            _write(self.folder / "preflight.json", record)
        note = f"at most {memory['total'] / 2**30:.2f} GiB expected"
        self.progress(Event("pretrain", 0, self.steps, note))
        return record

    def prepare(self, teacher: LlavaTeacher | None, device: str, mean: Rgb, std: Rgb) -> None:
        """Load the teacher where it is not given, and make everything ready for the first step."""
        c = self.config
        self.before = preflight.resident()
        where = f"cuda:{self.world.local}" if device == "cuda" else "cpu"
        self.where = torch.device(where)
        preflight.forget_peak(self.where)
        if teacher is None:
            dtype = torch.bfloat16 if self.half else torch.float32
            teacher = load_llava(c.teacher, plan=self.plan, dtype=dtype, device="cpu" if c.shard else where)
        if c.shard:
            shard_layers(teacher.model, self.world, device)
            teacher.model.to(self.where)  # what is not repeated: embeddings, projector, the head
        self.learner = Learner(c, self.network, teacher, self.world, mean, std)
        self._keep_features()
        if c.overfit is not None:
            self.record["overfit"] = self._overfit(c.overfit, mean, std)
            if self.world.first:
                _write(self.folder / "preflight.json", self.record)

    def train(self) -> Tree:
        """All steps that are left; the network's state after the last."""
        c = self.config
        step, before = self.store.resume(self.learner, self.world.first)
        started = time.perf_counter()
        while step < self.steps:
            row = self.step(step)
            self.store.rows.append(row)
            step += 1
            self.seconds = before + time.perf_counter() - started
            if self.world.first:
                self.progress(Event("pretrain", step, self.steps, f"loss {row['loss']:.3f}"))
                if step % c.checkpoint_every == 0 or step == self.steps:
                    self.store.save(self.learner, step, self.seconds)
        self.seconds = self.seconds or before
        self.peak = preflight.peak_bytes(self.where, self.before)
        return {k: v.cpu() for k, v in clone(self.network.state_dict()).items()}

    def _keep_features(self) -> None:
        """CLIP's features of all pictures, when something needs them and they fit; frozen and un-augmented, so once is enough."""
        t, s = self.learner.teacher, self.stream
        size = s.pictures * t.grid**2 * t.width * 4
        if self.config.needs_clip and t.family.direct and size <= CACHE_LIMIT:
            numbers = range(s.pictures)
            parts = [list(numbers[i : i + 64]) for i in range(0, s.pictures, 64)]
            self.z = torch.cat([t.features(s.decoded(p, s.sizes[1])).float().cpu() for p in parts])

    def step(self, step: int) -> dict[str, Any]:
        """Step 0, 1, ... of the run; its row of the curve."""
        c, world = self.config, self.world
        positions = self.stream.positions(step, c.batch_size)
        batch = self._read(step, positions)
        asked = positions[: c.lm_samples if c.lm_samples is not None else len(positions)]
        count = int(self.stream.predicted[asked].sum())
        alpha, rate = alpha_at(c, step, self.steps), lr_at(c, step, self.steps)
        z = self.z[batch.pictures] if self.z is not None else None
        told = self.learner.step(step, batch, alpha, rate, count, len(positions), z)
        row: dict[str, Any] = {"step": step + 1, "alpha": alpha, "lr": rate, **told}
        if world.size > 1:
            row["processes"] = world.size
        return row

    def _read(self, step: int, positions: Tensor) -> Batch:
        """This process's part of a batch; the next one is read meanwhile."""
        ahead = self._next
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self._load(step, positions)
        if step + 1 < self.steps:
            following = self.stream.positions(step + 1, self.config.batch_size)
            self._next = (step + 1, self._pool.submit(self._load, step + 1, following))
        return batch

    def _load(self, step: int, positions: Tensor) -> Batch:
        c = self.config
        text = self.world.share_of(c.lm_samples if c.lm_samples is not None else len(positions))
        alpha = alpha_at(c, step, self.steps)
        needs = alpha != 1 or c.feature_mse > 0 or c.objective == "features" or not self.learner.teacher.blind
        return self.stream.read(
            self.world.share(positions), text=text if c.objective == "lm" else 0, shown=needs and self.z is None
        )

    def _overfit(self, steps: int, mean: Rgb, std: Rgb) -> dict[str, Any]:
        """Steps on the first batch with a copy of the network at alpha 1; its record, or a refusal."""
        c = replace(self.config, alpha="one", drive="adam", gradient_checkpointing=False)
        learner = Learner(c, copy.deepcopy(self.network), self.learner.teacher, self.world, mean, std)
        positions = self.stream.positions(0, c.batch_size)
        asked = positions[: c.lm_samples if c.lm_samples is not None else len(positions)]
        count = int(self.stream.predicted[asked].sum())
        batch = self._load(0, positions)
        z = self.z[batch.pictures] if self.z is not None else None
        losses = [learner.step(i, batch, 1.0, c.lr, count, len(positions), z)["loss"] for i in range(steps)]
        return preflight.overfitted(losses)

    def _flop(self) -> int:
        """Operations of all steps, as many times those of the last one; it is taken once more, and its result is thrown away."""
        return counted(lambda: self.step(self.steps - 1))[1] * self.steps * self.world.size

    def close(self) -> None:
        """Let the reading thread end."""
        self._pool.shutdown(wait=True)

    def finish(self, tree: Tree) -> None:
        """Write the weights, then pretrain.json, which says that they are finished; the checkpoint and the index go."""
        flop = self._flop()
        plain_batch_norm(self.network)
        if not self.world.first:
            return
        save_checkpoint(self.folder / "pretrained.safetensors", tree, {"what": self.what})
        rows = [json.loads(line) for line in (self.folder / "pretrain.jsonl").read_bytes().splitlines()]
        last = rows[-max(1, len(rows) // 10) :]
        teacher = self.learner.teacher
        final = {
            "what": self.what, "teacher": {
                "name": teacher.name, "fingerprint": self.what["teacher"], "grid": teacher.grid, "width": teacher.width,
            },
            "flop": flop, "steps": self.steps, "samples": len(self.stream), "images": self.stream.pictures, "image_size": self.stream.sizes[0],
            "seconds": self.seconds, "processes": self.world.size, "precision": "bf16" if self.half else "fp32",
            "memory": {"expected": self.record["memory"]["total"], "measured": self.peak},
            "loss_first": rows[0]["loss"], "loss_last_tenth": sum(r["loss"] for r in last) / len(last),
            "trainable_parameters": sum(p.numel() for p in self.learner.trainable.values()), "weights_sha256": digest(tree),
            "sample": self.record["sample"], "overfit": self.record.get("overfit"),
        }  # fmt: skip
        _write(self.folder / "pretrain.json", final)
        for name in ("checkpoint.safetensors", "index.arrow"):
            (self.folder / name).unlink(missing_ok=True)


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
