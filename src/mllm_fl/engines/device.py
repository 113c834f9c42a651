"""Clients' images on a device, as uint8, and hooks of an algorithm run there: what the batched engine holds beside its program."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.config import EngineConfig
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree


def moved(a: Mapping[str, Tensor], device: torch.device) -> Tree:
    """The tree on ``device``; leaves that lie there already are the same tensors."""
    return {k: v.to(device) for k, v in a.items()}


@dataclass(frozen=True)
class DeviceShard(Shard):
    """A shard whose images and labels lie on a device: ``pixels`` uint8 (n_k, 3, h, w), ``labels`` int64 (n_k,)."""

    pixels: Tensor | None = None
    labels: Tensor | None = None

    @property
    def y(self) -> Tensor:
        assert self.labels is not None
        return self.labels

    def x(self, indices: Iterable[int]) -> Tensor:
        """As :meth:`Shard.x`, number by number, on the device."""
        assert self.pixels is not None
        at = torch.tensor(list(indices), dtype=torch.int64, device=self.pixels.device)
        mean, std = (torch.tensor(v, device=at.device).view(1, 3, 1, 1) for v in (self.images.mean, self.images.std))
        return (self.pixels[at].float().div_(255.0).sub_(mean)).div_(std)


class Residents:
    """Images that stay on the device, the least recently used going first beyond ``limit`` bytes.

    A set is known again by the store its pixels come from and the positions there; one that does not say so is sent each time.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit, self.bytes = device, limit, 0
        self._held: OrderedDict[tuple[int, bytes], tuple[object, Tensor]] = OrderedDict()

    def pixels(self, images: ImageSet) -> Tensor:
        """The set's pixels, uint8 (n, 3, h, w), on the device."""
        store, positions = getattr(images.pixels, "pixels", None), getattr(images.pixels, "positions", None)
        if store is None or positions is None:
            return images.read(range(len(images))).to(self.device)
        key = (id(store), positions.tobytes())
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][1]
        found = images.read(range(len(images))).to(self.device)
        self._held[key] = (store, found)  # the store is kept, so that its id stays its own
        self.bytes += found.nbytes
        while self.bytes > self.limit and len(self._held) > 1:
            self.bytes -= self._held.popitem(last=False)[1][1].nbytes
        return found

    def shard(self, shard: Shard) -> DeviceShard:
        """The shard with its images, labels and teacher's logits on the device."""
        values = {f.name: getattr(shard, f.name) for f in fields(Shard)}
        if shard.teacher is not None:
            values["teacher"] = shard.teacher.to(self.device)
        return DeviceShard(**values, pixels=self.pixels(shard.images), labels=shard.y.to(self.device))


class Watching(dict[str, Tensor]):
    """A tree that notes which names are looked for, there or not; whoever walks over it looks for all of them."""

    def __init__(self, a: Mapping[str, Tensor]) -> None:
        super().__init__(a)
        self.asked: set[str] = set()
        self.walked = False

    def __getitem__(self, k: str) -> Tensor:
        self.asked.add(k)
        return super().__getitem__(k)

    def get(self, k, default=None):  # type: ignore[no-untyped-def]
        self.asked.add(k)
        return super().get(k, default)

    def __contains__(self, k: object) -> bool:
        self.asked.add(str(k))
        return super().__contains__(k)

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.walked = True
        return super().__iter__()

    def keys(self):  # type: ignore[no-untyped-def]
        self.walked = True
        return super().keys()

    def items(self):  # type: ignore[no-untyped-def]
        self.walked = True
        return super().items()

    def values(self):  # type: ignore[no-untyped-def]
        self.walked = True
        return super().values()

    def __len__(self) -> int:
        self.walked = True
        return super().__len__()

    def __or__(self, other):  # type: ignore[no-untyped-def]
        self.walked = True
        return dict(super().items()) | dict(other)

    def __ror__(self, other):  # type: ignore[no-untyped-def]
        self.walked = True
        return dict(other) | dict(super().items())

    def copy(self):  # type: ignore[no-untyped-def]
        self.walked = True
        return dict(super().items())


class BeginsThere:
    """An algorithm whose ``begin`` leaves its result on a device; all else is the algorithm's own."""

    def __init__(self, algorithm: Algorithm, device: torch.device) -> None:
        self._algorithm, self._device = algorithm, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        return moved(self._algorithm.begin(task, msg, mine, shard), self._device)


def described(config: EngineConfig) -> dict[str, str]:
    """What a run's record says of the machine in the place of "cpu" and "deterministic", where the batched engine trains; {} elsewhere."""
    if config.name != "batched":
        return {}
    device = device_of(config)
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "deterministic": "no: kernels of the device"}
    return {"device": "cpu", "deterministic": "yes: CPU; within rounding of the serial engine, not its bits"}


def device_of(config: EngineConfig) -> torch.device:
    """The device of ``[federate.engine]``: "auto" is a CUDA device where there is one.

    Raises:
        UserError: "cuda" is asked for and there is none.
    """
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise UserError("federate.engine.device", "'cuda', but torch finds no CUDA device", "use 'auto' or 'cpu'")
    return torch.device("cuda" if there and config.device != "cpu" else "cpu")
