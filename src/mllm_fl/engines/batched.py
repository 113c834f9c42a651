"""The batched engine: the clients of a round as one tensor program, for a GPU (on a CPU it is slower than the serial engine).

Images lie on the device as uint8 and are cropped, flipped and normalised there; streams are those of every engine, drawn on the CPU. Clients
take steps of equal batch size together: first the full batches of an epoch, where a client with fewer of them waits, then the last,
partial ones, by size; so no batch is padded and BatchNorm's statistics are those of the client's own images. The order of a client's own
steps is the serial engine's, sums inside a convolution are not: in float32 on a CPU weights agree within 1e-5 after a round, not bit for bit, and
not where a ReLU's argument is zero up to rounding, where its slope is a coin's (the serial engine differs from itself there as much when its weights
move by 1e-7).

A method whose ``objective`` or ``correct`` looks at values (an ``if`` on a tensor, a boolean mask, a draw) cannot be one program: its clients are trained
one after another on the device. An event says so with the reason, and :attr:`BatchedEngine.record` keeps it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Shard, Task, Update
from mllm_fl.data.augment import scaled_padding
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.base import OnEvent, Reply, ignored
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.device import BeginsThere, DeviceShard, Residents, Watching, described, device_of, moved
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import _BN, _EACH, LocalConfig, _begin_batch_norm, train_client
from mllm_fl.engines.plan import all_epochs
from mllm_fl.engines.program import Inputs, Program
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree, clone, prefixed, under

Form = dict[str, tuple[tuple[int, ...], str]]
CPU = torch.device("cpu")
TOGETHER = {"cpu": 16, "cuda": 64}
"""Clients in one program at most; more are taken in equal parts, in client order."""
RESIDENT = {"cpu": 64 << 20, "cuda": 8 << 30}
"""Bytes of images that stay on the device."""
PROGRAMS = 4
CLOSE = {"fp32": 1e-3, "bf16": 5e-2}
"""How far, relatively, the loss under vmap may be from the loss of one client alone before vmap is not trusted with a method."""


class BatchedEngine:
    """See :class:`mllm_fl.engines.base.Engine`; ``record`` says on what it ran, how its clients were trained, and whether it repeats."""

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        algorithm: Algorithm,
        local: LocalConfig,
        batch_norm: str = "average",
        on_event: OnEvent = ignored,
    ) -> None:
        self.config, self.algorithm, self.local, self.batch_norm = config, algorithm, local, batch_norm
        self.device = device_of(config)
        on_gpu = self.device.type == "cuda"
        self.task = replace(task, net=copy.deepcopy(task.net).to(self.device)) if on_gpu else task
        self.on_event = on_event
        self.residents = Residents(self.device, RESIDENT[self.device.type])
        self.why_alone = ""
        self._names: dict[frozenset[str], frozenset[str]] = {}
        self._programs: dict[tuple[object, ...], Program] = {}
        self._flags: tuple[bool, bool, bool] | None = None
        self.record: dict[str, Any] = {
            "engine": "batched",
            **described(replace(config, name="batched")),
            "clients": "one program",
        }

    def __enter__(self) -> BatchedEngine:
        if self.device.type == "cuda":  # process-wide switches of torch, put back on leaving
            b, rounded = torch.backends, self.config.precision == "tf32"
            self._flags = (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark)
            self._switch(rounded, rounded, True)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._programs.clear()
        if self._flags is not None:
            self._switch(*self._flags)
        self.on_event("engine", **self.record)

    @staticmethod
    def _switch(products: bool, convolutions: bool, timed: bool) -> None:
        """TF32 in products and in convolutions; whether cuDNN times its kernels before it chooses one."""
        b = torch.backends
        b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark = products, convolutions, timed

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        there = Broadcast(moved(msg.w, self.device), moved(msg.extra, self.device))
        most = TOGETHER[self.device.type]
        parts = -(-len(shards) // most)
        size = -(-len(shards) // max(parts, 1))
        for first in range(0, len(shards), max(size, 1)):
            part = shards[first : first + size]
            start = time.perf_counter()
            replies = self._part(msg, there, part, [dict(memory.get(s.client, {})) for s in part])
            seconds = (time.perf_counter() - start) / len(part)
            for update, remembered in replies:
                yield Reply(update.client, update, remembered, seconds)

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        if self.device.type == "cpu":
            return evaluate(self.task, w, images)
        pixels, y = self.residents.pixels(images), torch.from_numpy(images.labels).to(self.device)
        test = DeviceShard(-1, 0, images, 0, None, pixels, y)
        total = Evaluation.none(len(self.task.class_names))
        w = moved(w, self.device)
        with torch.no_grad():
            for at in torch.arange(len(images)).split(2000):
                logits = self.task.forward(w, test.x(at.tolist()), train=False)[1]
                total = total + Evaluation.of(y[at.to(self.device)], logits)
        return total

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        there = Broadcast(moved(msg.w, self.device), moved(msg.extra, self.device))
        for shard in shards:
            answer = self.algorithm.survey(self.task, there, self.residents.shard(shard))
            yield shard.client, moved(answer, CPU)

    def _part(
        self, msg: Broadcast, there: Broadcast, part: Sequence[Shard], remembered: Sequence[Tree]
    ) -> list[tuple[Update, Tree]]:
        """What each of these clients sends and remembers, on the CPU, in order."""
        shards = [self.residents.shard(s) for s in part]
        if not self.why_alone:
            try:
                return self._together(msg, there, part, shards, remembered)
            except _NotOneProgram as e:
                self.why_alone = str(e)
                self.record["clients"] = f"one after another: {e}"
                method = type(self.algorithm).__name__
                self.on_event("clients not batched", method=method, reason=self.why_alone)
        return [self._alone(there, s, mine) for s, mine in zip(shards, remembered, strict=True)]

    def _alone(self, there: Broadcast, shard: DeviceShard, mine: Tree) -> tuple[Update, Tree]:
        """The serial engine's client loop, on the device."""
        algorithm = cast(Algorithm, BeginsThere(self.algorithm, self.device))
        mine = moved(mine, self.device)
        update, kept = train_client(self.task, algorithm, there, mine, shard, self.local, self.batch_norm)
        return update._replace(w=moved(update.w, CPU), extra=moved(update.extra, CPU)), moved(kept, CPU)

    def _together(
        self,
        msg: Broadcast,
        there: Broadcast,
        part: Sequence[Shard],
        shards: Sequence[DeviceShard],
        remembered: Sequence[Tree],
    ) -> list[tuple[Update, Tree]]:
        """One program for all clients whose memories have one form as far as the method looks at them; mostly one in all."""
        kept = [moved(under(mine, _BN), self.device) for mine in remembered]
        begin = BeginsThere(self.algorithm, self.device).begin
        begun = [
            begin(self.task, there, {k: v.to(self.device) for k, v in mine.items() if not k.startswith(_BN)}, shard)
            for mine, shard in zip(remembered, shards, strict=True)
        ]
        out: dict[int, tuple[Update, Tree]] = {}
        while left := [i for i in range(len(shards)) if i not in out]:
            names = self._looked_for(there, begun[left[0]], shards[left[0]])
            form = _form(begun[left[0]], names)
            alike = [i for i in left if _form(begun[i], names) == form]
            members = [shards[i] for i in alike]
            seen = [{k: begun[i][k] for k in form} for i in alike]
            program = self._program(there, form, members, seen, [kept[i] for i in alike])
            all_epochs(program, members, self.local)
            ended, losses = moved(program.w, CPU), program.loss.tolist()
            for row, i in enumerate(alike):
                mine = moved({k: v for k, v in begun[i].items() if not k.startswith(_EACH)}, CPU)
                w = {k: v[row].clone() for k, v in ended.items()}
                out[i] = self._finished(part[i], w, losses[row], msg, mine)
        return [out[i] for i in range(len(shards))]

    def _looked_for(self, there: Broadcast, mine: Tree, shard: DeviceShard) -> frozenset[str]:
        """Names in a client's memory that the method looks for in a local step, found by watching it take one on two images."""
        key = frozenset(mine)
        if key not in self._names:
            n = min(2, len(shard))
            at_two = Watching({k: v[:n] if k.startswith(_EACH) else v for k, v in mine.items()})
            at_all = Watching({k: v for k, v in mine.items() if not k.startswith(_EACH)})
            with torch.no_grad():
                self.algorithm.objective(self.task, clone(there.w), there, at_two, shard.x(range(n)), shard.y[:n])
                self.algorithm.correct({k: torch.zeros_like(there.w[k]) for k in self.task.trainable}, there, at_all)
            walked = at_two.walked or (at_all.walked and type(self.algorithm).correct is not Algorithm.correct)
            self._names[key] = key if walked else frozenset(at_two.asked | at_all.asked)
        return self._names[key]

    def _program(
        self, there: Broadcast, form: Form, shards: Sequence[DeviceShard], seen: Sequence[Tree], kept: Sequence[Tree]
    ) -> Program:
        """A program with these clients' images, memories and first weights in it."""
        trainable, starts = set(self.task.trainable), []
        for buffers in kept:
            start = {k: v if k in trainable else v.clone() for k, v in there.w.items()}
            _begin_batch_norm(start, buffers, self.batch_norm)
            starts.append(start)
        w = {k: torch.stack([start[k] for start in starts]) for k in there.w}
        each = {k: torch.cat([mine[k] for mine in seen]) for k in form if k.startswith(_EACH)}
        mine = {k: torch.stack([mine[k] for mine in seen]) for k in form if not k.startswith(_EACH)}
        pixels, labels = (
            torch.cat([v for v in vs if v is not None])
            for vs in zip(*((s.pixels, s.labels) for s in shards), strict=True)
        )
        inputs = Inputs(pixels, labels, each, mine)
        key = (len(shards), tuple(sorted(form.items())), tuple(pixels.shape[1:]))
        program = self._programs.pop(key, None)
        if program is not None:
            program.load(there, w, inputs)
        else:
            images = shards[0].images
            mean, std = (torch.tensor(v, device=self.device) for v in (images.mean, images.std))
            padding = scaled_padding(pixels.shape[-1])
            program = Program(
                self.task, self.algorithm, self.local, there, w, inputs, mean, std, padding, self._note,
                capture=self.device.type == "cuda",
            )  # fmt: skip
            self._try(program, shards, seen[0])
        self._programs[key] = program
        while len(self._programs) > PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        return program

    def _try(self, program: Program, shards: Sequence[DeviceShard], mine: Tree) -> None:
        """Take one step on two images of each client, hold the first client's loss against the loss of that client alone, take it back.

        Raises:
            _NotOneProgram: vmap refuses the method, or says something else.
        """
        n = min(2, *(len(s) for s in shards))
        starts = torch.tensor([0, *(len(s) for s in shards)]).cumsum(0)[:-1]
        centre = torch.full((len(shards), n), program.padding)
        plan = torch.stack([starts[:, None] + torch.arange(n), centre, centre, torch.zeros_like(centre)])
        state = [*program.w.values(), *program.momentum.values()]
        before = [v.clone() for v in state]
        rows = {k: v[:n] if k.startswith(_EACH) else v for k, v in mine.items()}
        w = {k: v[0].clone() for k, v in program.w.items()}
        with torch.no_grad():
            alone = self.algorithm.objective(self.task, w, program.msg, rows, shards[0].x(range(n)), shards[0].y[:n])
        try:
            program.step(None, plan.to(self.device))
        except Exception as e:
            raise _NotOneProgram(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
        one, other = float(program.loss[0]), float(alone)
        if abs(one - other) > CLOSE[self.task.precision] * max(1.0, abs(other)):
            raise _NotOneProgram(f"its loss is {one:.6g} under vmap and {other:.6g} alone")
        for v, old in zip(state, before, strict=True):
            v.copy_(old)
        program.start()

    def _finished(self, shard: Shard, w: Tree, loss: float, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        """The method's ``finish``, on the CPU, with what :func:`mllm_fl.engines.local.train_client` adds."""
        steps = self.local.epochs * -(-len(shard) // self.local.batch_size)
        local = Local(shard.client, w, steps, loss / steps, shard, self.local.lr, self.local.momentum)
        update, remembered = self.algorithm.finish(self.task, local, msg, mine)
        if self.batch_norm == "local":
            trainable = set(self.task.trainable)
            remembered = {**remembered, **prefixed({k: v.clone() for k, v in w.items() if k not in trainable}, _BN)}
        return update._replace(metrics={"steps": float(steps), **update.metrics}), remembered

    def _note(self, what: str) -> None:
        self.record["note"] = what
        self.on_event("engine note", note=what)


class _NotOneProgram(Exception):
    """The method cannot be trained for many clients at a time; the message says why."""


def _form(mine: Tree, names: frozenset[str]) -> Form:
    """Shapes and dtypes of the leaves that a method looks for; of those with one row per image without the rows."""
    return {
        k: (tuple(v.shape[1:] if k.startswith(_EACH) else v.shape), str(v.dtype))
        for k, v in sorted(mine.items())
        if k in names
    }
