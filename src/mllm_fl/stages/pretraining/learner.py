"""One step of stage 1b: the compact model's tokens once for the whole batch, the language model part by part, one step of the optimiser.

The gradient stops at the tokens and is added up there over the parts, then goes through the compact model once: BatchNorm and the loss are those
of the whole batch, however small the parts are, and the compact model's inner values are kept once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.network import Network
from mllm_fl.models.teacher.blend import lm_loss
from mllm_fl.models.teacher.conversation import collate
from mllm_fl.models.teacher.llava import LlavaTeacher, compute_twice
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.parallel import World, student_of
from mllm_fl.stages.pretraining.samples import Batch


class Learner:
    """The compact model, its optimiser, and the frozen teacher; ``mean`` and ``std`` normalise the compact model's input."""

    def __init__(
        self,
        config: PretrainConfig,
        network: Network,
        teacher: LlavaTeacher,
        world: World,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        self.config, self.network, self.teacher, self.world = config, network, teacher, world
        self.device = teacher.device
        network.to(self.device).train()
        self.student = student_of(network, teacher.grid, world)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (mean, std))
        self.trainable = {k: p for k, p in network.named_parameters() if not k.startswith("classifier.")}
        weights = list(self.trainable.values())
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(weights, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay)
            if config.drive == "sgd"
            else torch.optim.AdamW(
                weights, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
            )
        )
        self.half = teacher.projector_dtype == torch.bfloat16
        if config.gradient_checkpointing:
            compute_twice(teacher.model)

    def step(
        self, at: int, batch: Batch, alpha: float, rate: float, count: int, size: int, z: Tensor | None = None
    ) -> dict[str, float]:
        """Take step ``at`` = 0, 1, ...; ``count``: predicted tokens of the whole batch, ``size``: its samples, over all processes. ``z``: CLIP's features of this part.

        Returns:
            What is told of the step: losses and the gradient's norm, equal in all processes.

        Raises:
            UserError: the loss is not finite.
        """
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            tokens: Tensor = self.student((batch.student.to(self.device).float() / 255 - self.mean) / self.std)
        leaf = tokens.detach().float().requires_grad_()
        lm = mse = 0.0
        for a in range(0, len(tokens), self.config.micro_batch or len(tokens)):
            b = min(a + (self.config.micro_batch or len(tokens)), len(tokens))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                part_lm, part_mse = self._part(batch, leaf, slice(a, b), alpha, count, size, z)
            loss = (part_lm if part_lm is not None else 0) + self._weight * (part_mse if part_mse is not None else 0)
            if isinstance(loss, Tensor):
                torch.autograd.backward(loss, inputs=[leaf])
            lm += float(part_lm.detach()) if part_lm is not None else 0.0
            mse += float(part_mse.detach()) if part_mse is not None else 0.0
        lm, mse = self.world.total([lm, mse], self.device)
        told: dict[str, float] = {}
        if self.config.objective == "lm":
            told["lm_loss"] = lm
        if self._weight:
            told["feature_mse"] = mse
        told["loss"] = lm + self._weight * mse
        if not math.isfinite(told["loss"]):
            raise UserError("pretrain.lr", f"the loss is {told['loss']} in step {at + 1}", "lower pretrain.lr")
        grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        tokens.backward(grad.to(tokens.dtype) * self.world.size)  # type: ignore[no-untyped-call]  # processes are averaged
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        told["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.config.grad_clip))
        self.optimiser.step()
        return told

    @property
    def _weight(self) -> float:
        """Of the error to CLIP's features."""
        return 1.0 if self.config.objective == "features" else self.config.feature_mse

    def _part(
        self, batch: Batch, tokens: Tensor, part: slice, alpha: float, count: int, size: int, z: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """This part's share of the language model's loss, and of the error to CLIP's features."""
        t, shown = self.teacher, batch.shown
        ask = self._weight > 0 or (alpha != 1 and t.family.direct)
        z = z[part].to(self.device) if z is not None else t.features(shown[part]) if ask and shown is not None else None
        lm = mse = None
        samples = batch.samples[part]
        if samples:
            ids, mask, labels = (v.to(self.device) for v in collate(samples, t.processor.tokenizer.pad_token_id or 0))
            few = slice(part.start, part.start + len(samples))
            mine = z[: len(samples)] if z is not None and alpha != 1 and t.family.direct else None
            pictures = shown[few] if shown is not None else None
            lm = lm_loss(t, ids, mask, labels, tokens[few], alpha, mine, images=pictures, count=count)
        if self._weight:
            assert z is not None
            packed = t.family.pack(tokens[part], t.config, t.place)
            mse = F.mse_loss(packed, z.float()) * ((part.stop - part.start) / size)
        return lm, mse
