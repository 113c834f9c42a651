"""Methods that a worker process has to import: what happens when a client kills its process, raises, or remembers."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import time
from pathlib import Path

import torch
from PIL import Image

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Shard, Task, Update
from mllm_fl.trees import Tree


@dataclasses.dataclass(frozen=True)
class Remembers(Algorithm):
    """FedAvg whose clients count their visits, and whose loss the count scales."""

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        return {"visits": mine.get("visits", torch.zeros(())) + 1}

    def objective(
        self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        return super().objective(task, w, msg, mine, x, y) / mine["visits"]


@dataclasses.dataclass(frozen=True)
class Dies(Remembers):
    """Client ``who`` kills its process ``times`` times in round ``when``; ``tally`` is the file that counts."""

    tally: str = ""
    times: int = 1
    who: int = 1
    when: int = 2

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        if local.client == self.who and local.shard.round == self.when:
            before = Path(self.tally).read_text() if Path(self.tally).exists() else ""
            if len(before) < self.times:
                Path(self.tally).write_text(before + "x")
                os.kill(os.getpid(), signal.SIGKILL)
        return super().finish(task, local, msg, mine)


@dataclasses.dataclass(frozen=True)
class Raises(Algorithm):
    """Client 2 divides by zero."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, mine = super().finish(task, local, msg, mine)
        return update._replace(weight=1 / (2 - local.client)), mine


@dataclasses.dataclass(frozen=True)
class Waits(Remembers):
    """Client ``slow`` takes ``seconds`` longer than the others."""

    slow: int = 0
    seconds: float = 0.3

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        if local.client == self.slow:
            time.sleep(self.seconds)
        return super().finish(task, local, msg, mine)


@dataclasses.dataclass(frozen=True)
class Coloured:
    """``count`` encoded images, each of one colour of its own; more are decoded than a message would carry."""

    count: int

    def __len__(self) -> int:
        return self.count

    def get(self, index: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (index % 256, index * 7 % 256, index * 31 % 256)).save(out, "PNG")
        return out.getvalue()

    def place(self, index: int) -> str:
        return f"image {index}"
