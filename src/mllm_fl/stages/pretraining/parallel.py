"""Stage 1b on several devices or machines, started by ``torchrun``: each process has a share of every batch, and all end with the same weights.

The compact model is wrapped in DistributedDataParallel and its BatchNorm sees the whole batch; the frozen layers are cut among the processes on
request (FSDP). One process reads and writes the folder. Nothing here draws numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.network import Network


@dataclass(frozen=True)
class World:
    """The processes that train together; a single one unless ``torchrun`` started this program."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, positions: Tensor) -> Tensor:
        """This process's part of a batch: every ``size``-th, so that the first k of the batch are the first ones of the parts."""
        return positions[self.rank :: self.size]

    def share_of(self, count: int) -> int:
        """How many of the first ``count`` samples of a batch are in this process's part."""
        return len(range(self.rank, count, self.size))

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """The sums over processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def shared(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def together(device: str) -> Iterator[World]:
    """The processes that ``torchrun`` started, joined (gloo on CPUs, NCCL on GPUs); alone, without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    ours = not dist.is_initialized()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum over processes too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        out = grads[0].contiguous().clone()
        dist.all_reduce(out)
        return out


def _sum(x: Tensor) -> Tensor:
    out: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return out


class _WholeBatch(nn.BatchNorm2d):
    """BatchNorm over the parts of all processes, for CPUs too (torch's SyncBatchNorm is for accelerators); the variance in two passes."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = _sum(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = _sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * count / (count - 1), momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        out: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)


def whole_batch_norm(network: nn.Module) -> None:
    """Let every BatchNorm of ``network`` see the whole batch; names and state stay.

    Raises:
        UserError: a BatchNorm of another class, which would see a part only.
    """
    for name, m in network.named_modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = _WholeBatch
        elif isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, _WholeBatch):
            raise UserError(
                "model.name",
                f"{name} is a {type(m).__name__}, which sees only a process's part of a batch",
                "use a model with plain BatchNorm or without it, or one process",
            )


def plain_batch_norm(network: nn.Module) -> None:
    """Undo :func:`whole_batch_norm`."""
    for m in network.modules():
        if isinstance(m, _WholeBatch):
            setattr(m, "__class__", nn.BatchNorm2d)  # noqa: B010 (for mypy it is no attribute to assign to)


class Tokens(nn.Module):
    """The part of the network that stage 1 trains: images (n, 3, h, h) -> (n, grid * grid, d). What does not take part is left outside."""

    def __init__(self, network: Network, grid: int) -> None:
        super().__init__()
        self.network, self.grid = network, grid

    def forward(self, x: Tensor) -> Tensor:
        return self.network.tokens(x, self.grid)


def student_of(network: Network, grid: int, world: World) -> nn.Module:
    """The compact model as one process calls it; among several, its gradients are averaged as they come."""
    tokens = Tokens(network, grid)
    if world.size == 1:
        return tokens
    whole_batch_norm(network)
    ignored = [f"network.{k}" for k, _ in network.named_parameters() if k.startswith("classifier.")]
    ddp: Any = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(tokens, ignored)
    wrapped: nn.Module = ddp(tokens, find_unused_parameters=True, broadcast_buffers=False)
    return wrapped


def shard_layers(model: nn.Module, world: World, device: str) -> int:
    """Cut every repeated layer of the frozen model among the processes (FSDP); returns how many. They are gathered one at a time, when used."""
    if world.size == 1:
        return 0
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world.size,))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [layer for m in lists for layer in m if any(True for _ in layer.parameters())]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return len(layers)
