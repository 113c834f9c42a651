"""Stage 1b, Dynamic Weighted Pretraining (MLLM-LLaVA-FL, arXiv:2409.06067, §3.1): the compact model learns inside a frozen LLaVA.

    (1)  H_v = W Z_v
    (2)  Z_v = (1 - alpha) g(X) + alpha g_fl(X),   alpha from 0 to 1 by a cosine over the first half of training, then 1

g (CLIP), W (projector) and the language model are frozen; the loss is LLaVA's over the answers' tokens. The paper gives lr 2e-3, batch
128, 4 epochs; optimiser, warm-up and clipping are those of LLaVA's own pretraining script, per-step granularity of alpha is ours.
While alpha is small the gradient of g_fl is small too, and Adam turns it into full steps all the same: ``alpha = "one"`` and
``objective = "features"`` are there because the paper's rule need not be the best one at every scale.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from mllm_fl.annotate.corpus import Corpus
from mllm_fl.engines.checkpoint import fit, load_checkpoint, save_checkpoint, write_atomic
from mllm_fl.engines.flops import counted
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.network import Network
from mllm_fl.models.resnet8 import STRIDE, ResNet8
from mllm_fl.models.teacher.blend import lm_loss
from mllm_fl.models.teacher.conversation import Sample, collate, encode, shown
from mllm_fl.models.teacher.llava import LlavaTeacher, fingerprint, load_llava
from mllm_fl.runs import differences, read_json
from mllm_fl.seeds import stream
from mllm_fl.toml import to_dict
from mllm_fl.trees import Tree, clone, digest, prefixed, under

CACHE_LIMIT = 2 << 30  # bytes of CLIP features that are kept


@dataclass(frozen=True)
class PretrainConfig:
    """``[pretrain]``: how the compact model learns from the corpus.

    ``teacher``: "mini", a LLaVA folder, or a hub id. ``steps``: optimiser steps; ``epochs``, when given, takes their place.
    ``alpha``: "paper" (cosine 0 to 1 over the fraction ``alpha_until`` of the steps, then 1), "linear" (the same as a straight line),
    "one" (the compact model alone from the beginning), "zero" (CLIP alone: teaches nothing, a check). ``objective``: "lm" is the
    paper's; "features" is the mean squared error to CLIP's features without the language model. ``feature_mse``: weight of
    that error beside "lm"; ``lm_samples`` then lets only so many of a batch's conversations into the language model, which is the
    costly part, and absent means all. ``hand_over``: what stage 2 gets, backbone and adapter, or the backbone with a fresh adapter.
    ``max_tokens``: longest conversation, picture included. ``image_size``: pixels a side of the compact model's input; absent means,
    for ResNet-8, four times the teacher's grid, so that its map has one position for each of the teacher's features (64 for a grid of 16, 16 for
    the bundled 4); for another network, the federation's image size, and the map is resized to the grid.
    """

    teacher: str = "mini"
    steps: int = 400
    epochs: float | None = None
    batch_size: int = 128
    lr: float = 2e-3
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    alpha: Literal["paper", "linear", "one", "zero"] = "paper"
    alpha_until: float = 0.5
    objective: Literal["lm", "features"] = "lm"
    feature_mse: float = 0.0
    lm_samples: int | None = None
    hand_over: Literal["adapter", "backbone"] = "adapter"
    max_tokens: int = 512
    image_size: int | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"pretrain.{name}",
                    f"{getattr(self, name)} is below 1",
                    "leave [pretrain] out to switch pretraining off",
                )
        for name, low, high in (
            ("warmup", 0.0, 1.0),
            ("alpha_until", 0.0, 1.0),
            ("lr", 0.0, 10.0),
            ("feature_mse", 0.0, 1e6),
            ("weight_decay", 0.0, 10.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"pretrain.{name}", f"{getattr(self, name)} is outside {low:g} .. {high:g}")
        if self.lm_samples is not None and not (0 < self.lm_samples <= self.batch_size and self.feature_mse > 0):
            raise UserError(
                "pretrain.lm_samples",
                f"{self.lm_samples} must be in 1 .. batch_size, and needs feature_mse for the other samples",
                "leave it out to use the whole batch",
            )
        if self.epochs is not None and not self.epochs > 0:
            raise UserError("pretrain.epochs", f"{self.epochs} is not positive", "leave it out to give steps instead")
        if not self.grad_clip > 0 or not all(0 <= b < 1 for b in self.betas):
            raise UserError("pretrain.grad_clip", "grad_clip must be positive, betas in [0, 1)")


def alpha_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Weight of the compact model in eq. (2) at step 0, 1, ...: the paper's is (1 - cos(pi s / S)) / 2, then 1."""
    if config.alpha in ("one", "zero"):
        return float(config.alpha == "one")
    rise = config.alpha_until * steps
    if step >= rise:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * step / rise)) if config.alpha == "paper" else step / rise


def lr_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up over the first ``warmup`` of the steps, then half a cosine towards 0.

    With W warm-up steps of S: lr (s + 1) / W, which is lr itself in step W - 1, then lr (1 + cos(pi (s - W) / (S - W))) / 2, which begins
    with lr and would be 0 in step S, one after the last. (The Trainer of LLaVA's script begins with a step at 0 instead.)
    """
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def pretrain(
    config: PretrainConfig,
    network: Network,
    corpus: Corpus | Path,
    folder: Path,
    *,
    seed: int = 0,
    teacher: LlavaTeacher | None = None,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    side: int | None = None,
    progress: Progress = silent,
) -> Tree:
    """Pretrain a copy of ``network`` on ``corpus``; returns its whole state, classifier as it was.

    ``folder`` gets pretrained.safetensors, pretrain.jsonl (a row per step) and, last, pretrain.json. Killed at any moment, the same call
    resumes and ends with the same bytes. ``mean`` and ``std`` normalise the compact model's input and must be those of stage 2.
    ``side``: pixels a side of the federation's images, for a network that is not ResNet-8 (see ``image_size``); absent means the pictures' own.

    Raises:
        UserError: no corpus, a teacher that does not fit, a sample with nothing to predict, a diverging loss, or a folder that was
            begun with other settings or is in use.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    what = {
        "config": {k: v for k, v in to_dict(config).items() if k != "checkpoint_every"}, "seed": seed, "mean": list(mean), "std": list(std),
        "corpus": corpus.digests(), "network": digest(network.state_dict()),
        "side": _side_of(config, network, None, side), "teacher": teacher.fingerprint if teacher is not None else fingerprint(config.teacher),
    }  # fmt: skip
    like = clone(network.state_dict())
    done = folder / "pretrain.json"
    if done.exists():  # finished: several runs may read it at a time, so no lock
        _same(done, what, read_json(done)["what"])
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return fit(load_checkpoint(folder / "pretrained.safetensors")[0], like, folder / "pretrained.safetensors")
    with _alone(folder):
        width = network.feature_dim
        teacher = teacher or load_llava(config.teacher, width)
        what["teacher"] = what["teacher"] or teacher.fingerprint  # a hub id may have been fetched only now
        if width != teacher.width:
            raise UserError(
                "model.adapter_dim",
                f"is {width}, but the projector of {teacher.name!r} takes {teacher.width} channels",
                f"set it to {teacher.width}",
            )
        config = replace(config, image_size=_side_of(config, network, teacher, side))
        trainer = _Trainer(config, copy.deepcopy(network), corpus, teacher, folder, seed, mean, std, what)
        tree = trainer.run(progress)
        if config.hand_over == "backbone":
            tree |= {k: v for k, v in like.items() if k.startswith("adapter.")}
        trainer.finish(tree)
        return tree


def _side_of(config: PretrainConfig, network: Network, teacher: LlavaTeacher | None, side: int | None) -> int | None:
    """Pixels a side of the compact model's input; None where the teacher decides it and is not at hand, or the pictures do."""
    if config.image_size is not None:
        return config.image_size
    if isinstance(network.backbone, ResNet8):
        return None if teacher is None else STRIDE * teacher.grid
    return side


class _Trainer:
    """The state of one pretraining: what is fixed is prepared once, what changes is in the checkpoint."""

    def __init__(
        self,
        config: PretrainConfig,
        network: Network,
        corpus: Corpus,
        teacher: LlavaTeacher,
        folder: Path,
        seed: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        what: dict[str, Any],
    ) -> None:
        self.config, self.network, self.teacher, self.folder, self.seed, self.what = (
            config,
            network,
            teacher,
            folder,
            seed,
            what,
        )
        self.seconds, self.rows = 0.0, []  # type: tuple[float, list[dict[str, Any]]]
        place = {name: i for i, name in enumerate(corpus.images)}
        self.image_of = torch.tensor([place[r.image] for r in corpus.records])
        self.samples: list[Sample] = []
        if config.objective == "lm":
            for r in corpus.records:
                pairs = [(r.turns[i].text, r.turns[i + 1].text) for i in range(0, len(r.turns), 2)]
                self.samples.append(encode(teacher, pairs, config.max_tokens, f"{corpus.folder}: record {r.id}"))
        else:
            self.image_of = torch.arange(len(corpus.images))
        self.pixels = corpus.pixels(config.image_size)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self.z = self._features()
        self.trainable = {k: p for k, p in network.named_parameters() if not k.startswith("classifier.")}
        self.optimiser = torch.optim.AdamW(
            list(self.trainable.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        n = len(self.image_of)
        self.steps = config.steps if config.epochs is None else max(1, round(config.epochs * n / config.batch_size))
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def _features(self) -> Tensor | None:
        """CLIP's features of all pictures, when something needs them and they fit; frozen and un-augmented, so once is enough."""
        c, t = self.config, self.teacher
        needed = c.objective == "features" or c.feature_mse > 0 or c.alpha != "one"
        if not needed or len(self.pixels) * t.grid**2 * t.width * 4 > CACHE_LIMIT:
            return None
        return t.features(self.pixels)

    def run(self, progress: Progress) -> Tree:
        step = self._resume()
        self.network.train()
        started, before = time.perf_counter(), self.seconds
        while step < self.steps:
            row = self._step(step)
            self.rows.append(row)
            step += 1
            self.seconds = before + time.perf_counter() - started
            progress(Event("pretrain", step, self.steps, f"loss {row['loss']:.3f}"))
            if step % self.config.checkpoint_every == 0 or step == self.steps:
                self._save(step)
        return clone(self.network.state_dict())

    def _step(self, step: int) -> dict[str, Any]:
        c = self.config
        batch = self._batch(step)
        images = self.image_of[batch]
        x = (self.pixels[images].float() / 255 - self.mean) / self.std
        tokens = self.network.tokens(x, self.teacher.grid)
        alpha = alpha_at(c, step, self.steps)
        row: dict[str, Any] = {"step": step + 1, "alpha": alpha, "lr": lr_at(c, step, self.steps)}
        needs = alpha != 1 or c.feature_mse > 0 or c.objective == "features"
        z = None if not needs else self.z[images] if self.z is not None else self.teacher.features(self.pixels[images])
        loss = torch.zeros(())
        if c.objective == "lm":
            few = slice(c.lm_samples)
            ids, mask, labels = collate(
                [self.samples[int(i)] for i in batch[few]], self.teacher.processor.tokenizer.pad_token_id or 0
            )
            lm = lm_loss(
                self.teacher, ids, mask, labels, tokens[few], alpha, z[few] if z is not None and alpha != 1 else None
            )
            loss = loss + lm
            row["lm_loss"] = float(lm.detach())
        if z is not None and (c.feature_mse > 0 or c.objective == "features"):
            mse = F.mse_loss(tokens, z)
            loss = loss + (c.feature_mse if c.objective == "lm" else 1.0) * mse
            row["feature_mse"] = float(mse.detach())
        row["loss"] = float(loss.detach())
        if not math.isfinite(row["loss"]):
            raise UserError("pretrain.lr", f"the loss is {row['loss']} in step {step + 1}", "lower pretrain.lr")
        for group in self.optimiser.param_groups:
            group["lr"] = row["lr"]
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss, inputs=list(self.trainable.values()))
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), c.grad_clip))
        self.optimiser.step()
        return row

    def _batch(self, step: int) -> Tensor:
        """Positions of a step's samples: permutations of all of them, one after the other, cut into batches."""
        n, b = len(self.image_of), self.config.batch_size
        out = []
        for p in range(step * b, (step + 1) * b):
            if self._order[0] != p // n:
                self._order = (p // n, torch.randperm(n, generator=stream(self.seed, "pretrain-order", p // n)))
            out.append(self._order[1][p % n])
        return torch.stack(out)

    def _save(self, step: int) -> None:
        """Rows first, then the checkpoint that counts them: whatever is killed, rows beyond the count are cut off later."""
        path = self.folder / "pretrain.jsonl"
        with open(path, "ab") as f:
            f.write("".join(json.dumps(r) + "\n" for r in self.rows).encode())
        self.rows = []
        tensors = prefixed(self.network.state_dict(), "network.")
        for name, p in self.trainable.items():
            for k in ("exp_avg", "exp_avg_sq"):
                if k in self.optimiser.state[p]:  # a parameter that the loss does not reach has no moments
                    tensors[f"adam.{k}.{name}"] = self.optimiser.state[p][k]
        record = {"step": step, "rows": path.stat().st_size, "seconds": self.seconds, "what": self.what}
        save_checkpoint(self.folder / "checkpoint.safetensors", tensors, record)

    def _resume(self) -> int:
        """The number of steps that are done; puts weights, optimiser and curve back to where they were then."""
        path, curve = self.folder / "checkpoint.safetensors", self.folder / "pretrain.jsonl"
        for leftover in self.folder.glob(".*.tmp-*"):  # of a killed process: the lock says that nobody writes here now
            leftover.unlink()
        if not path.exists():
            curve.unlink(missing_ok=True)
            return 0
        tensors, record = load_checkpoint(path)
        _same(path, self.what, record["what"])
        like = clone(self.network.state_dict())
        self.network.load_state_dict(fit(under(tensors, "network."), like, path))
        for name, p in self.trainable.items():
            if f"adam.exp_avg.{name}" not in tensors:
                continue
            self.optimiser.state[p] = {
                "step": torch.tensor(float(record["step"])), **{k: tensors[f"adam.{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
            }  # fmt: skip
        have = curve.stat().st_size if curve.exists() else 0
        if have < record["rows"]:
            raise UserError(
                curve,
                f"has {have} bytes, the checkpoint was written when it had {record['rows']}",
                f"delete {self.folder}",
            )
        with open(curve, "ab") as f:
            f.truncate(record["rows"])
        self.seconds = float(record["seconds"])
        return int(record["step"])

    def _flop(self) -> int:
        """Operations of all steps, as many times those of the last one; it is taken once more, and its result is thrown away."""
        return counted(lambda: self._step(self.steps - 1))[1] * self.steps

    def finish(self, tree: Tree) -> None:
        """Write the weights, then pretrain.json, which says that they are finished; the checkpoint goes."""
        save_checkpoint(self.folder / "pretrained.safetensors", tree, {"what": self.what})
        rows = [json.loads(line) for line in (self.folder / "pretrain.jsonl").read_bytes().splitlines()]
        last = rows[-max(1, len(rows) // 10) :]
        final = {
            "what": self.what, "teacher": {
                "name": self.teacher.name, "fingerprint": self.what["teacher"], "grid": self.teacher.grid, "width": self.teacher.width,
            },
            "flop": self._flop(), "steps": self.steps, "samples": len(self.image_of), "images": len(self.pixels), "image_size": self.pixels.shape[-1], "seconds": self.seconds,
            "loss_first": rows[0]["loss"], "loss_last_tenth": sum(r["loss"] for r in last) / len(last),
            "trainable_parameters": sum(p.numel() for p in self.trainable.values()), "weights_sha256": digest(tree),
            "sample": shown(self.teacher, self.samples[0]) if self.samples else None,
        }  # fmt: skip
        write_atomic(self.folder / "pretrain.json", (json.dumps(final, indent=1, ensure_ascii=False) + "\n").encode())
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(str(folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(folder, "another process is pretraining in this folder", "wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _same(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse weights that were made otherwise; a teacher that is not on this machine now is not compared."""
    if now["teacher"] is None:
        now, then = ({k: v for k, v in w.items() if k != "teacher"} for w in (now, then))
    diff = differences(then, json.loads(json.dumps(now)))
    if diff:
        raise UserError(
            path, f"was made with other settings: {'; '.join(diff)}", f"delete {path.parent}, or use another folder"
        )
