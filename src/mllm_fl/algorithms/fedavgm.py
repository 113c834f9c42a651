"""FedAvgM.

Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019,
arXiv:1909.06335, section 4.3.

    v <- momentum v + sum_k p_k (w_k - w^t),   w^{t+1} = w^t + server_lr v
    (ema)  v <- momentum v + (1 - momentum) sum_k p_k (w_k - w^t),   from v = the first change

v runs over trainable parameters; BatchNorm's statistics are averaged as in FedAvg (FedDF's code does the same). CReFF's options name
0.97 without saying which form: undamped that is a steady gain of 33 and tends to diverge. Default 0.9 undamped, Hsu's own value; ``form``
"ema" is FedBE's code, which starts at full speed too, after some rounds of plain FedAvg, and passes BatchNorm's statistics through v.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from mllm_fl.algorithms.base import Algorithm, Server, Task, Update, in_ranges
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree


@dataclass(frozen=True)
class FedAvgM(Algorithm):
    """``momentum``: of the server, 0.9 (Hsu et al.). ``form``: undamped "sum" or "ema". ``server_lr``: 1 in the paper."""

    momentum: float = 0.9
    form: Literal["sum", "ema"] = "sum"
    server_lr: float = 1.0
    neutral: ClassVar[dict[str, Any]] = {"momentum": 0.0}

    def __post_init__(self) -> None:
        in_ranges(self, momentum="[0, 1)", server_lr="(0, 100]")
        if self.form not in ("sum", "ema"):
            raise UserError("federate.method.form", f"FedAvgM knows no form {self.form!r}", "use 'sum' or 'ema'")

    def init(self, task: Task, w: Tree) -> Server:
        return Server(w=w, extra={k: torch.zeros_like(w[k]) for k in task.trainable})  # v

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        mean = super().server(task, s, updates).w
        change = {k: mean[k] - s.w[k] for k in s.extra}
        begun = any(bool(v.any()) for v in s.extra.values())
        share = 1 - self.momentum if self.form == "ema" and begun else 1.0
        v = {k: self.momentum * s.extra[k] + share * change[k] for k in s.extra}
        moved = {
            k: mean[k] + (self.server_lr * v[k] - change[k]) for k in v
        }  # w + lr v, and FedAvg's bits at momentum 0
        return replace(s, w=mean | moved, extra=v)
