"""The contract of an algorithm. Its defaults are FedAvg.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, 2017, arXiv:1602.05629, Algorithm 1:

    w^{t+1} = sum_{k in S_t} (n_k / n) w_k,   w_k = local SGD from w^t on client k's n_k images

What we add: BatchNorm's running statistics are averaged like weights (CReFF's code does; plain FedAvg predates
BatchNorm), and its integer batch counter stays an integer.

An algorithm is a frozen dataclass whose fields are its hyper-parameters. Its hooks are pure: they take values and
return values, store nothing on ``self``, draw numbers only from the streams they are handed, and change none
of their arguments (the one exception is torch's own: a forward pass in training mode updates the BatchNorm buffers
in the ``w`` it is given, which belongs to that client alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.losses import cross_entropy
from mllm_fl.seeds import method_stream
from mllm_fl.trees import Tree, weighted_mean


def empty_leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf of this shape and dtype without values or memory, to say a form with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def in_ranges(method: Algorithm, **intervals: str) -> None:
    """Refuse a field outside its interval, ``in_ranges(self, momentum="[0, 1)")``: one line with method, field, default and FedAvg's value.

    Raises:
        UserError: a value outside, or NaN.
    """
    cls = type(method)
    for name, interval in intervals.items():
        value, (low, high) = getattr(method, name), (float(v) for v in interval[1:-1].split(","))
        above = low < value if interval[0] == "(" else low <= value
        if not (above and (value < high if interval[-1] == ")" else value <= high)):
            default = f"the default is {cls.__dataclass_fields__[name].default}"
            neutral = f", {cls.neutral[name]} is FedAvg" if name in cls.neutral else ""
            problem = f"{cls.__name__} needs {name} in {interval}, not {value}"
            raise UserError(f"federate.method.{name}", problem, default + neutral)


class Broadcast(NamedTuple):
    """Server to client: the global weights and whatever else the method sends."""

    w: Tree
    extra: Tree


class Update(NamedTuple):
    """Client to server: local weights, their weight in the mean (images, n_k), extras, and metrics to record."""

    client: int
    w: Tree
    weight: float
    extra: Tree
    metrics: dict[str, float]


@dataclass(frozen=True)
class Server:
    """The whole state of the server after ``round`` rounds."""

    w: Tree
    extra: Tree = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class Shard:
    """One client's images in one round, and its named random streams."""

    client: int
    round: int
    images: ImageSet
    seed: int
    teacher: Tensor | None = None
    """The frozen teacher's zero-shot logits on these images, un-augmented: float32 (n_k, C); None unless the method needs them."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def y(self) -> Tensor:
        """Labels, int64, shape (n_k,)."""
        return torch.from_numpy(self.images.labels)

    def x(self, indices: Iterable[int]) -> Tensor:
        """Normalised images at these positions, un-augmented: float32, (len(indices), 3, height, width)."""
        return self.images.normalised(list(indices))

    def stream(self, purpose: str) -> torch.Generator:
        """The stream (run, purpose, round, client); the engine's own purposes are refused."""
        return method_stream(self.seed, purpose, self.round, self.client)


class Local(NamedTuple):
    """What local training left behind: the weights, the steps taken, their mean loss, the data for a last look, and how it stepped."""

    client: int
    w: Tree
    steps: int
    loss: float
    shard: Shard
    lr: float = 0.1
    momentum: float = 0.0


@dataclass(frozen=True)
class Task:
    """What is learned, and what the server owns beside it. Frozen; the same object in every engine.

    ``net`` is structure only: weights always come in as a Tree of all parameters and buffers.
    ``population``: images of each client. ``unlabelled``, ``labelled`` (class-balanced): public server images, never a
    test image; None unless the method needs them. ``texts`` (C, d): the teacher's unit text embeddings of the class names.
    ``precision`` "bf16" runs forward and backward passes under autocast; weights, their sums and all losses stay float32.
    ``channels_last``: how images lie in memory during a pass; results agree up to rounding.
    """

    net: nn.Module
    class_names: tuple[str, ...]
    population: Sequence[int]
    seed: int
    unlabelled: ImageSet | None = None
    labelled: ImageSet | None = None
    texts: Tensor | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters; the other leaves of a weight Tree are buffers."""
        return tuple(k for k, _ in self.net.named_parameters())

    @property
    def head(self) -> tuple[str, str]:
        """Names of the classifier's weight (C, d) and bias (C,), the last two parameters of the network."""
        weight, bias = self.trainable[-2:]
        return weight, bias

    def forward(self, w: Tree, x: Tensor, *, train: bool = True) -> tuple[Tensor, Tensor]:
        """(feature (n, d), logits (n, C)) of images (n, 3, h, w) under weights ``w``; training mode moves BN buffers in ``w``."""
        self.net.train(train)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            out: tuple[Tensor, Tensor] = torch.func.functional_call(self.net, w, (x,))
        return (out[0].float(), out[1].float()) if self.precision == "bf16" else out

    def stream(self, purpose: str, *keys: int | str) -> torch.Generator:
        """The server's stream (run, purpose, keys...); the engine's own purposes are refused."""
        return method_stream(self.seed, purpose, *keys)


@dataclass(frozen=True)
class Algorithm:
    """FedAvg, and the base of every other method: override the hooks that differ, declare the rest.

    ``neutral``: field values under which the method must equal FedAvg bit for bit. ``uploads`` / ``downloads``: what
    travels beyond weights, in words; ``upload_bytes`` / ``download_bytes`` say it in numbers. ``needs``: what must be at
    hand beyond the client's own images, any of "unlabelled", "labelled" (server images), "teacher" (its logits at each
    client), "texts" (its text embeddings at the server). ``concludes``: after the last round all clients are surveyed once.
    """

    neutral: ClassVar[dict[str, Any]] = {}
    uploads: ClassVar[str] = "nothing"
    downloads: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[str, ...]] = ()
    concludes: ClassVar[bool] = False

    def upload_bytes(self, task: Task, present: int) -> int:
        """Bytes that one client with images of ``present`` classes sends in a round beyond weights; the suite counts them."""
        return 0

    def download_bytes(self, task: Task) -> int:
        """Bytes that one client receives in a round beyond weights, once the server has all it needs; the suite counts them."""
        return 0

    def upload_form(self, task: Task) -> Mapping[str, Tree] | None:
        """What ``Update.extra`` may hold, as {group: leaves} of which names, shapes and dtypes count (``empty_leaf``); the suite compares.

        The leaves of a group come together or not at all, those of the group "" always come. An update of another form is refused like one
        with NaN. None: not declared, so that only NaN and Inf are refused. By default nothing may be sent, unless the method has a ``finish`` of its own.
        """
        return {} if type(self).finish is Algorithm.finish else None

    def survey_form(self, task: Task) -> Mapping[str, Tree] | None:
        """The same for what ``survey`` answers, if the method ``concludes``."""
        return None

    def init(self, task: Task, w: Tree) -> Server:
        """The state before the first round."""
        return Server(w=w)

    def broadcast(self, s: Server) -> Broadcast:
        """What every online client receives."""
        return Broadcast(s.w, {})

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        """The client's memory as this round uses it, before local training; ``mine`` is {} on the first visit.

        Leaves named ``each/...`` have one row per image: ``objective`` finds there the rows of its batch, and they are
        gone before ``finish`` (they are recomputed or re-read at the next visit, never remembered or sent).
        """
        return mine

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        """The scalar that one local step differentiates, on a batch x (b, 3, h, w), y (b,)."""
        return cross_entropy(task.forward(w, x)[1], y)

    def correct(self, grads: Tree, msg: Broadcast, mine: Tree) -> Tree:
        """The gradient that the local optimiser sees, over the trainable leaves that the objective reaches."""
        return grads

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        """What the client sends, and what it remembers until its next visit."""
        return Update(local.client, local.w, float(len(local.shard)), {}, {"loss": local.loss}), mine

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        """The next state; ``updates`` come once, in client order, all valid, at least one."""
        return replace(s, w=weighted_mean((u.weight, u.w) for u in updates))

    def survey(self, task: Task, msg: Broadcast, shard: Shard) -> Tree:
        """After the last round, if the method ``concludes``: what one client answers about the final model."""
        return {}

    def conclude(self, task: Task, s: Server, answers: Iterable[tuple[int, Tree]]) -> Server:
        """The state after the survey; ``answers`` are (client, answer), once, in client order."""
        return s

    def deploy(self, task: Task, s: Server) -> Tree:
        """The weights that are evaluated and shipped; may differ from what is broadcast."""
        return s.w


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """FedAvg (arXiv:1602.05629): every hook at its default."""
