"""One tensor program that takes a local step of many clients at a time: what the batched engine runs.

Clients' weights, buffers, momenta and memories are stacked, leaf by leaf, along a first dimension K; ``torch.func.vmap`` turns the algorithm's
own ``objective`` (written for one client) into one over K, and the gradient of the sum of K losses is each client's own,
because no client's weights enter another's loss. On CUDA the step is captured into a graph for each shape that occurs, so that
the processor only hands over indices; inputs are therefore copied into buffers that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Task
from mllm_fl.data.augment import Draws, cropped
from mllm_fl.engines.local import LocalConfig
from mllm_fl.trees import Tree

GRAPHS = 24
"""Shapes of a program that are captured; what comes after runs as single kernels, correct but slower."""
WARM = 3  # steps before a capture, as torch asks for; they are taken back


@dataclass
class Inputs:
    """What K clients bring to a round: images of all of them one after another, and stacked memories."""

    pixels: Tensor
    """uint8 (N, 3, h, w)."""
    labels: Tensor
    """int64 (N,)."""
    each: Tree
    """Leaves with one row per image, (N, ...), under the names that ``objective`` looks for."""
    mine: Tree
    """Leaves of the clients' memories, (K, ...)."""


@dataclass
class Program:
    """The step of K clients with memories of one form. ``w`` (K, ...) holds the clients' weights and buffers, before and after.

    ``local``: the optimiser and the augmentation; ``mean``, ``std``, ``padding``: of the images. ``on_note``: told what was not captured, and why.
    """

    task: Task
    algorithm: Algorithm
    local: LocalConfig
    msg: Broadcast
    w: Tree
    inputs: Inputs
    mean: Tensor
    std: Tensor
    padding: int
    on_note: Callable[[str], None]
    capture: bool = False
    momentum: Tree = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.zeros(0))
    _graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task = replace(self.task, channels_last=False)  # not expressible under vmap
        self.trainable = self.task.trainable
        self.corrects = type(self.algorithm).correct is not Algorithm.correct
        self.device = self.mean.device
        if self.capture:
            self.inputs = _roomy(self.inputs)
        self.start()

    @property
    def clients(self) -> int:
        """K."""
        return len(next(iter(self.w.values())))

    def load(self, msg: Broadcast, w: Tree, inputs: Inputs) -> None:
        """Take up another round of as many clients with memories of the same form; what graphs read is overwritten where it lies."""
        if not self.capture:
            self.msg, self.w, self.inputs = msg, w, inputs
        elif not self._fits(msg, inputs):
            self._graphs.clear()
            self.msg, self.w, self.inputs, self.momentum, self.loss = msg, w, _roomy(inputs), {}, torch.zeros(0)
        else:
            pairs = [(self.msg.w, msg.w), (self.msg.extra, msg.extra), (self.w, w)]
            pairs += [(self.inputs.mine, inputs.mine), (_rows_of(self.inputs), _rows_of(inputs))]
            for there, here in pairs:
                for k, v in here.items():
                    (there[k][: len(v)] if v.dim() else there[k]).copy_(v)
        self.start()

    def start(self) -> None:
        """A fresh optimiser and no loss, in place where they exist: every round of a client begins so."""
        if len(self.loss) != self.clients:
            self.loss = torch.zeros(self.clients, dtype=torch.float64, device=self.device)
            self.momentum = {k: torch.zeros_like(self.w[k]) for k in self.trainable} if self.local.momentum else {}
        for v in (self.loss, *self.momentum.values()):
            v.zero_()

    def losses(self, w: Tree, mine: Tree, each: Tree, x: Tensor, y: Tensor) -> Tensor:
        """The objective of each client on its own batch: x (K, b, 3, h, w), y (K, b) -> (K,). Buffers in ``w`` move."""

        def one(w: Tree, mine: Tree, each: Tree, x: Tensor, y: Tensor) -> Tensor:
            return self.algorithm.objective(self.task, w, self.msg, mine | each, x, y)

        found: Tensor = torch.vmap(one)(w, mine, each, x, y)
        return found

    def step(self, rows: Tensor | None, plan: Tensor) -> None:
        """One local step of the clients ``rows`` (all if None): ``plan`` int64 (4, clients, b): positions, top, left, turned."""
        at, top, left, turned = plan.unbind(0)
        x = cropped(self.inputs.pixels, at, Draws(top, left, turned), self.padding, self.mean, self.std)
        w, mine, momentum = (_picked(a, rows) for a in (self.w, self.inputs.mine, self.momentum))
        each = {k: v[at] for k, v in self.inputs.each.items()}
        params = {k: w[k].detach().requires_grad_(True) for k in self.trainable}
        with torch.enable_grad():
            losses = self.losses(w | params, mine, each, x, self.inputs.labels[at])
            found = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        grads = {k: g for k, g in zip(params, found, strict=True) if g is not None}
        with torch.no_grad():
            if self.corrects:
                grads = torch.vmap(lambda g, m: self.algorithm.correct(g, self.msg, m))(grads, mine)
            for k, g in grads.items():
                p = params[k]
                if self.local.weight_decay:
                    g = g.add(p, alpha=self.local.weight_decay)
                if self.local.momentum:
                    g = momentum[k].mul_(self.local.momentum).add_(g)
                p.add_(g, alpha=-self.local.lr)
            if rows is None:
                self.loss.add_(losses.detach())
            else:
                self.loss.index_add_(0, rows, losses.detach().double())
                for there, here in ((self.w, w), (self.momentum, momentum)):
                    for k, v in here.items():
                        there[k].index_copy_(0, rows, v)

    def run(self, rows: Sequence[int], plan: Tensor) -> None:
        """The same from the processor's side: ``rows`` ascending, ``plan`` on the CPU."""
        every = len(rows) == self.clients
        key = (every, tuple(plan.shape))
        if self.capture and key not in self._graphs and len(self._graphs) < GRAPHS:
            self._captured(key, None if every else torch.tensor(rows), plan)
        if key in self._graphs:
            graph, static, static_rows = self._graphs[key]
            static.copy_(plan)
            if static_rows is not None:
                static_rows.copy_(torch.tensor(rows))
            graph.replay()
            return
        at = None if every else torch.tensor(rows, device=self.device)
        self.step(at, plan.to(self.device))

    def _captured(self, key: tuple[object, ...], rows: Tensor | None, plan: Tensor) -> None:
        """Capture the step for this shape; the steps that torch wants before are taken back. On failure single kernels are used from now on."""
        static, static_rows = plan.to(self.device), None if rows is None else rows.to(self.device)
        state = [*self.w.values(), *self.momentum.values(), self.loss]
        before = [v.clone() for v in state]
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    self.step(static_rows, static)
            torch.cuda.current_stream(self.device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(static_rows, static)
            self._graphs[key] = (graph, static, static_rows)
        except RuntimeError as e:
            self.capture = False
            self._graphs.clear()
            torch.cuda.synchronize(self.device)
            self.on_note(f"no CUDA graph: {str(e).splitlines()[0]}")
        for v, old in zip(state, before, strict=True):
            v.copy_(old)

    def _fits(self, msg: Broadcast, inputs: Inputs) -> bool:
        """Whether the buffers at hand can hold another round's inputs."""
        same = [(self.msg.w, msg.w), (self.msg.extra, msg.extra), (self.inputs.mine, inputs.mine)]
        if any({k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()} for a, b in same):
            return False
        held, new = _rows_of(self.inputs), _rows_of(inputs)
        return held.keys() == new.keys() and all(
            len(held[k]) >= len(v) and held[k].shape[1:] == v.shape[1:] for k, v in new.items()
        )


def _rows_of(inputs: Inputs) -> Tree:
    """What has one row per image."""
    return {**inputs.each, "/pixels": inputs.pixels, "/labels": inputs.labels}


def _roomy(inputs: Inputs) -> Inputs:
    """The same with a quarter more room for images, so that a round of some images more needs no new buffers."""
    rows = {k: torch.cat([v, v.new_zeros((len(v) // 4 + 1, *v.shape[1:]))]) for k, v in _rows_of(inputs).items()}
    return replace(inputs, pixels=rows.pop("/pixels"), labels=rows.pop("/labels"), each=rows)


def _picked(a: Tree, rows: Tensor | None) -> Tree:
    return dict(a) if rows is None else {k: v.index_select(0, rows) for k, v in a.items()}
