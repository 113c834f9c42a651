"""What methods have in common whose clients share their label histograms: the server's estimate of the global prior.

Not a method. A client sends its counts n_kc, one number a class, once a visit; the server keeps the last counts of every client seen so far and
broadcasts their sum. A client takes the larger of that sum and its own count, class by class (its own are not in the sum before its first answer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Shard, Task, Update, empty_leaf
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class SharesCounts(Algorithm):
    """``prior``: whose label counts adjust the logits, the federation's as far as known ("global") or the client's own ("local")."""

    prior: Literal["global", "local"] = "global"
    uploads: ClassVar[str] = "label counts, one number a class (prior = global)"
    downloads: ClassVar[str] = "label counts summed over clients (prior = global)"

    def __post_init__(self) -> None:
        if self.prior not in ("global", "local"):
            problem = f"{type(self).__name__} knows no prior {self.prior!r}"
            raise UserError("federate.method.prior", problem, "use 'global' or 'local'")

    def upload_bytes(self, task: Task, present: int) -> int:
        return 4 * len(task.class_names) if self.prior == "global" else 0

    def download_bytes(self, task: Task) -> int:
        return self.upload_bytes(task, 0)

    def upload_form(self, task: Task) -> dict[str, Tree]:
        return {"": {"counts": empty_leaf(len(task.class_names))}} if self.prior == "global" else {}

    def init(self, task: Task, w: Tree) -> Server:
        if self.prior == "local":
            return Server(w=w)
        return Server(w=w, extra={"counts": torch.zeros(len(task.population), len(task.class_names))})

    def broadcast(self, s: Server) -> Broadcast:
        return Broadcast(s.w, {k: v.sum(0) for k, v in s.extra.items()})

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        own = torch.bincount(shard.y, minlength=len(task.class_names)).float()
        return {"own": own, "counts": torch.maximum(msg.extra["counts"], own) if msg.extra else own}

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, _ = super().finish(task, local, msg, mine)
        return update._replace(extra={"counts": mine["own"]} if self.prior == "global" else {}), {}

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        rows = {k: v.clone() for k, v in s.extra.items()}

        def seen() -> Iterator[Update]:
            for u in updates:
                for k in rows:
                    rows[k][u.client] = u.extra[k]
                yield u

        return replace(super().server(task, s, seen()), extra=rows)

    @staticmethod
    def shares(mine: Tree) -> Tensor:
        """The prior (C,) of this client's round, summing to one."""
        return mine["counts"] / mine["counts"].sum()
