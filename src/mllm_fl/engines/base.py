"""The seam between a round and how it is executed: stages know this protocol, and no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard, Task, Update
from mllm_fl.data.images import ImageSet
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.cores import workers_at_hand
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.metrics import Evaluation
from mllm_fl.trees import Tree

OnEvent = Callable[..., None]
"""``on_event(kind, **fields)``: what an engine has to tell beside its results, for example a worker that died."""


class Reply(NamedTuple):
    """One client's answer: its update, what it now remembers, and the seconds it took."""

    client: int
    update: Update
    memory: Tree
    seconds: float


class Engine(Protocol):
    """How clients are executed. Every engine trains the same bits as the serial one, unless it says otherwise in its own file.

    Used as a context manager; what it holds (processes, a device's memory) is given back on leaving.
    """

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None: ...

    def clients(self, msg: Broadcast, shards: Sequence[Shard], memory: Mapping[int, Tree]) -> Iterator[Reply]:
        """Train the online clients; replies come in the order of ``shards``, which is client order."""
        ...

    def evaluate(self, w: Tree, images: ImageSet) -> Evaluation:
        """Confusion matrix and calibration of the model ``w`` on ``images``, un-augmented, in evaluation mode."""
        ...

    def survey(self, msg: Broadcast, shards: Sequence[Shard]) -> Iterator[tuple[int, Tree]]:
        """What each client answers to ``Algorithm.survey``: (client, answer), in the order of ``shards``."""
        ...


def ignored(kind: str, **fields: object) -> None:
    """The event handler of an engine that nobody listens to."""


def client_failed(who: str, said: str, traceback: str, fields: dict[str, Any], on_event: OnEvent) -> UserError:
    """The one line for an exception in a client's hooks, after an event has kept its whole traceback."""
    on_event("client failed", **fields, cause=traceback)
    return UserError(who, said, "its traceback is in events.jsonl; mend the cause, and the same command resumes")


def possible(config: EngineConfig) -> None:
    """Nothing if this machine has what the engine needs: asked before anything is computed.

    Raises:
        UserError: what is missing, and the line to type.
    """
    if config.name == "flower-sim":
        from mllm_fl.engines.flower import can_simulate

        can_simulate()


def open_engine(
    config: EngineConfig,
    task: Task,
    algorithm: Algorithm,
    local: LocalConfig,
    batch_norm: str = "average",
    on_event: OnEvent = ignored,
) -> Engine:
    """The engine that ``[federate.engine]`` names, ready for ``with``.

    Precision and layout are the task's (:func:`mllm_fl.engines.probe.chosen` decides them before the task is made).
    """
    if config.name == "flower":
        way_out = "start them: `mllm-fl deploy up --local --nodes 3 CONFIG` (docs/deploy.md)"
        raise UserError("federate.engine.name", "'flower' trains on other machines", way_out)
    if config.name == "flower-sim":
        from mllm_fl.engines.simulated import FlowerSimEngine

        return FlowerSimEngine(config, task, algorithm, local, batch_norm, on_event)
    if config.name == "batched":
        from mllm_fl.engines.batched import BatchedEngine

        return BatchedEngine(config, task, algorithm, local, batch_norm, on_event)
    if config.name == "parallel":
        from mllm_fl.engines.parallel import ParallelEngine

        return ParallelEngine(config, task, algorithm, local, batch_norm, on_event)
    if config.name == "auto" and (config.workers or workers_at_hand()) > 1:
        from mllm_fl.engines.auto import AutoEngine

        return AutoEngine(config, task, algorithm, local, batch_norm, on_event)
    from mllm_fl.engines.serial import SerialEngine

    return SerialEngine(config, task, algorithm, local, batch_norm, on_event)
