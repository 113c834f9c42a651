"""A method under observation: the same method, with every hook's arguments compared before and after the call.

:func:`spied` makes a subclass whose hooks call the method's own. What they find goes into a :class:`Log`: arguments that a hook
changed, fields or class attributes that it wrote, and leaves of memory or server state that it looked for and that nobody kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, Local, Server, Shard, Task, Update
from mllm_fl.trees import Tree, digest

HOOKS = (
    "init", "broadcast", "begin", "objective", "correct", "finish", "server", "survey", "conclude", "deploy",
)  # fmt: skip


@dataclass
class Log:
    """What was found, in the order it happened; each entry once."""

    changed: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def note(self, where: list[str], what: str) -> None:
        """Add ``what`` unless it is there."""
        if what not in where:
            where.append(what)


class Watched(dict[str, Tensor]):
    """A Tree that reports the names that are looked for and not there, while ``miss`` is set."""

    miss: Callable[[str], None] | None = None

    def __missing__(self, key: str) -> Tensor:
        self._look(key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        self._look(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._look(key)
        return super().get(key, default)

    def _look(self, key: object) -> None:
        if self.miss is not None and not super().__contains__(key):
            self.miss(str(key))


def fingerprint(value: object, names: Iterable[str] | None = None) -> object:
    """Something equal exactly for equal values, of whatever a hook takes or gives; None of what has no bits of its own."""
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if isinstance(v, Tensor) and (names is None or k in names)}
        return tuple(value) if names is None and len(kept) < len(value) else digest(kept)
    if isinstance(value, Broadcast):
        return fingerprint(value.w), fingerprint(value.extra)
    if isinstance(value, Server):
        return fingerprint(value.w), fingerprint(value.extra), value.round
    if isinstance(value, Update):
        return value.client, fingerprint(value.w), value.weight, fingerprint(value.extra), tuple(value.metrics.items())
    if isinstance(value, Local):
        return fingerprint(value.w), value.steps, value.loss, fingerprint(value.shard)
    if isinstance(value, Shard):
        return value.images.labels.tobytes(), None if value.teacher is None else fingerprint(value.teacher)
    if isinstance(value, Task):
        return digest(value.net.state_dict())
    return None


def spied(method: Algorithm, log: Log) -> Algorithm:
    """The method with every hook observed; it computes the same bits."""
    cls = type(method)
    visits: dict[int, int] = {}
    current: list[int] = []
    members: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__}

    def on_itself() -> tuple[dict[str, Any], dict[str, Any]]:
        mine = {k: repr(v) for k, v in getattr(method_spy, "__dict__", {}).items()}
        classes = {k: repr(v) for c in cls.__mro__ for k, v in vars(c).items() if not callable(v) and k[:2] != "__"}
        return mine, classes

    def observed(hook: str) -> Callable[..., Any]:
        def call(self: Algorithm, *args: Any) -> Any:
            log.calls[hook] = log.calls.get(hook, 0) + 1
            own = on_itself()
            handed, kept = _hand_over(hook, args)
            before = [_seen(hook, i, value, args) for i, value in enumerate(kept)]
            result = getattr(super(type(self), self), hook)(*handed)
            for i, value in enumerate(kept):
                if _seen(hook, i, value, args) != before[i]:
                    log.note(log.changed, f"{hook} changes its argument {ARGUMENTS[hook][i]!r}")
            for was, now in zip(own, on_itself(), strict=True):
                for k in sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k)):
                    log.note(log.stored, f"{hook} stores {k!r} on the method")
            return _plain(result)

        return call

    def watch(tree: Tree, hook: str, whose: str, wanted: bool) -> Tree:
        watched = Watched(tree)
        if wanted:
            watched.miss = lambda k: log.note(log.forgotten, f"{hook} looks for {k!r} in {whose}")
        return watched

    def _hand_over(hook: str, args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        """The arguments with trees under watch, and what is to be compared afterwards."""
        handed, kept = list(args), list(args)
        names = ARGUMENTS[hook]
        if hook == "begin":
            current[:] = [args[names.index("shard")].client]
            visits[current[0]] = visits.get(current[0], 0) + 1
        for i, name in enumerate(names):
            if name == "mine":
                handed[i] = watch(args[i], hook, "the client's memory", visits.get(current[0], 0) > 1)
            elif name == "s":
                extra = watch(args[i].extra, hook, "the server's state", args[i].round > 0)
                handed[i] = replace(args[i], extra=extra)
            elif name in ("updates", "answers"):
                kept[i] = list(args[i])
                handed[i] = iter(kept[i])
        for i, name in enumerate(names):
            if name in ("mine", "s"):
                kept[i] = handed[i]
        return handed, kept

    for hook in HOOKS:
        members[hook] = observed(hook)
    spy = type(cls.__name__, (cls,), members)
    method_spy: Algorithm = spy(**{name: getattr(method, name) for name in _fields(method)})
    return method_spy


ARGUMENTS = {
    "init": ("task", "w"),
    "broadcast": ("s",),
    "begin": ("task", "msg", "mine", "shard"),
    "objective": ("task", "w", "msg", "mine", "x", "y"),
    "correct": ("grads", "msg", "mine"),
    "finish": ("task", "local", "msg", "mine"),
    "server": ("task", "s", "updates"),
    "survey": ("task", "msg", "shard"),
    "conclude": ("task", "s", "answers"),
    "deploy": ("task", "s"),
}


def _seen(hook: str, i: int, value: Any, args: tuple[Any, ...]) -> object:
    if hook == "objective" and ARGUMENTS[hook][i] == "w":  # a forward pass may move the BatchNorm buffers, nothing else
        return fingerprint(value, args[0].trainable)
    if ARGUMENTS[hook][i] in ("updates", "answers"):
        return [fingerprint(v) if isinstance(v, Update) else (v[0], fingerprint(v[1])) for v in value]
    return fingerprint(value)


def _plain(result: Any) -> Any:
    """The result with watched trees made plain again."""
    if isinstance(result, Watched):
        return dict(result)
    if isinstance(result, Broadcast):
        return Broadcast(_plain(result.w), _plain(result.extra))
    if isinstance(result, Server):
        return replace(result, w=_plain(result.w), extra=_plain(result.extra))
    if isinstance(result, Update):
        return result._replace(w=_plain(result.w), extra=_plain(result.extra))
    if isinstance(result, tuple):
        return tuple(_plain(v) for v in result)
    return result


def _fields(method: Algorithm) -> Iterator[str]:
    return (f.name for f in fields(method) if f.init)
