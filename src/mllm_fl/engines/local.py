"""The only client loop. Every engine calls it, so that every engine trains the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Shard, Task, Update
from mllm_fl.data.augment import augment, scaled_padding
from mllm_fl.engines.guard import pure
from mllm_fl.errors import UserError
from mllm_fl.seeds import stream
from mllm_fl.trees import Tree, clone, prefixed, under

_BN = "batch_norm/"  # where the client's own running statistics lie in its memory
_EACH = "each/"  # leaves of `begin` with one row per image


@dataclass(frozen=True)
class LocalConfig:
    """``[federate.local]``: one client's training in one round; the defaults are CReFF's (PROTOCOL: lr 0.1, 10 epochs).

    ``augment``: random crop (zero padding of an eighth of the side) and horizontal flip. ``aug_mode``: "batch" draws one
    offset and one flip for the whole batch, as CReFF's code does; "sample" draws them per image.
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    augment: Literal["none", "crop", "crop-flip"] = "crop-flip"
    aug_mode: Literal["batch", "sample"] = "batch"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"federate.local.{name}", f"{getattr(self, name)} is below 1")
        if not 0 < self.lr <= 1000:
            raise UserError("federate.local.lr", f"{self.lr} is not in (0, 1000]")
        if not 0 <= self.momentum < 1:
            raise UserError("federate.local.momentum", f"{self.momentum} is not in [0, 1)")
        if not self.weight_decay >= 0:
            raise UserError("federate.local.weight_decay", f"{self.weight_decay} is negative")


def augmented(x: Tensor, config: LocalConfig, generator: torch.Generator) -> Tensor:
    """The batch (b, 3, h, w), normalised, as a client sees it while training."""
    if config.augment == "none":
        return x
    padding = scaled_padding(x.shape[-1])
    return augment(x, generator, padding=padding, flip=config.augment == "crop-flip", mode=config.aug_mode)


def train_client(
    task: Task,
    algorithm: Algorithm,
    msg: Broadcast,
    mine: Tree,
    shard: Shard,
    config: LocalConfig,
    batch_norm: str = "average",
) -> tuple[Update, Tree]:
    """One client's round: local SGD from the broadcast weights; returns what it sends and what it remembers.

    Batches are a fresh permutation each epoch from the stream (run, "shuffle", round, client), the last partial batch
    is kept, augmentation draws from (run, "augment", round, client). The optimiser is fresh every round.
    """
    with pure(
        algorithm, "a client's hook", {"the broadcast": msg.w, "what was sent beside it": msg.extra, "its memory": mine}
    ):
        return _train(task, algorithm, msg, mine, shard, config, batch_norm)


def _train(
    task: Task, algorithm: Algorithm, msg: Broadcast, mine: Tree, shard: Shard, config: LocalConfig, batch_norm: str
) -> tuple[Update, Tree]:
    trainable = task.trainable
    w = clone(msg.w)
    if task.channels_last:
        w = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in w.items()}
    kept = under(mine, _BN)
    mine = {k: v for k, v in mine.items() if not k.startswith(_BN)}
    _begin_batch_norm(w, kept, batch_norm)
    mine = algorithm.begin(task, msg, mine, shard)
    each = {k: v for k, v in mine.items() if k.startswith(_EACH)}
    mine = {k: v for k, v in mine.items() if k not in each}
    for k in trainable:
        w[k].requires_grad_(True)
    params = [w[k] for k in trainable]
    optimiser = torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    shuffle, draws = (stream(shard.seed, purpose, shard.round, shard.client) for purpose in ("shuffle", "augment"))
    y_all = shard.y
    x_all = shard.x(range(len(shard))) if _fits(shard) else None
    loss_sum, steps = 0.0, 0
    for _ in range(config.epochs):
        order = torch.randperm(len(shard), generator=shuffle)
        for batch in torch.split(order, config.batch_size):
            x = x_all[batch] if x_all is not None else shard.x(batch.tolist())
            rows = mine | {k: v[batch] for k, v in each.items()} if each else mine
            loss = algorithm.objective(task, w, msg, rows, augmented(x, config, draws), y_all[batch])
            found = zip(trainable, torch.autograd.grad(loss, params, allow_unused=True), strict=True)
            grads = algorithm.correct({k: g for k, g in found if g is not None}, msg, mine)
            for k in trainable:
                w[k].grad = grads.get(k)  # a parameter that the loss does not reach is left alone, as torch's SGD does
            optimiser.step()
            loss_sum += float(loss.detach())
            steps += 1
    w = {k: v.detach().contiguous() for k, v in w.items()}  # one layout leaves, whatever it was trained in
    update, remembered = algorithm.finish(
        task, Local(shard.client, w, steps, loss_sum / max(steps, 1), shard, config.lr, config.momentum), msg, mine
    )
    if batch_norm == "local":
        buffers = {k: v.clone() for k, v in w.items() if k not in set(trainable)}
        remembered = {**remembered, **prefixed(buffers, _BN)}
    return update._replace(metrics={"steps": float(steps), **update.metrics}), remembered


def _begin_batch_norm(w: Tree, kept: Tree, policy: str) -> None:
    """Put in place the running statistics that the client starts from; ``w`` is the client's own copy."""
    if policy == "local":
        w.update(clone(kept))
    elif policy == "reset":
        for k, v in w.items():
            if k.endswith("running_mean") or k.endswith("num_batches_tracked"):
                v.zero_()
            elif k.endswith("running_var"):
                v.fill_(1)


def _fits(shard: Shard, limit: int = 64 << 20) -> bool:
    """Whether the whole shard, normalised, stays below ``limit`` bytes."""
    return len(shard) == 0 or shard.images.read([0]).numel() * 4 * len(shard) <= limit
