"""CUDA's part of the batched engine on a machine without CUDA: a stand-in for graphs that runs again what it was shown, where it lay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.engines.test_batched import LOCAL, rounds
from torch import Tensor

from mllm_fl.algorithms.base import FedAvg
from mllm_fl.conformance import toy
from mllm_fl.conformance.row import row_of
from mllm_fl.engines import batched
from mllm_fl.engines.batched import BatchedEngine
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.program import Program
from mllm_fl.trees import digest


class Stream:
    """A queue of work that is always done."""

    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


class Graph:
    """Replays a step on the very tensors it was captured with; refuses if the program reads others by then, as a real one could not."""

    made: list[Graph] = []

    def __init__(self) -> None:
        self.steps: list[tuple[Program, tuple[Any, ...], list[int]]] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for program, args, lay in self.steps:
            assert addresses(program) == lay, "the graph would read memory that is no longer the program's"
            STEP(program, *args)


STEP: Callable[..., None] = Program.step
capturing: list[Graph] = []


def addresses(program: Program) -> list[int]:
    trees = [program.w, program.momentum, program.msg.w, program.msg.extra, program.inputs.mine, program.inputs.each]
    leaves = [v for tree in trees for v in tree.values()]
    return [v.data_ptr() for v in (*leaves, program.inputs.pixels, program.inputs.labels, program.loss)]


@contextlib.contextmanager
def graph(into: Graph) -> Iterator[None]:
    capturing.append(into)
    try:
        yield
    finally:
        capturing.pop()


def step(program: Program, rows: Tensor | None, plan: Tensor) -> None:
    """Within a capture nothing is computed: the graph takes note."""
    if capturing:
        capturing[-1].steps.append((program, (rows, plan), addresses(program)))
    else:
        STEP(program, rows, plan)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, stand_in in (
        ("Stream", Stream), ("current_stream", Stream), ("stream", lambda s: contextlib.nullcontext()), ("CUDAGraph", Graph), ("graph", graph),
        ("synchronize", lambda device: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Program, "step", step)
    monkeypatch.setattr(batched, "Program", lambda *args, **options: Program(*args, **options | {"capture": True}))
    Graph.made.clear()
    return monkeypatch


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_graphs_give_the_bytes_of_single_kernels(name: str, cuda: pytest.MonkeyPatch) -> None:
    """Also in the fourth round, which has as many clients as the second, but others: what a graph reads is overwritten in place."""
    world = row_of(name).world(sizes=(19, 18, 11, 9))
    found = rounds("batched", world, row_of(name).rich, count=4)[0]
    assert len(Graph.made) > 1 and sum(g.replays for g in Graph.made) > len(Graph.made)
    cuda.undo()
    assert [digest(a) for a in found] == [digest(a) for a in rounds("batched", world, row_of(name).rich, count=4)[0]]


def test_a_capture_that_fails_goes_on_with_single_kernels_and_says_so(cuda: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refused(into: Graph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
        yield

    cuda.setattr(torch.cuda, "graph", refused)
    said: list[tuple[str, dict[str, Any]]] = []
    world = row_of("fedavg").world()
    found, _, engine = rounds(
        "batched", world, FedAvg(), on_event=lambda kind, **fields: said.append((kind, dict(fields)))
    )
    note = "no CUDA graph: operation not permitted when stream is capturing"
    assert ("engine note", {"note": note}) in said
    assert isinstance(engine, BatchedEngine) and engine.record["note"] == note
    cuda.undo()
    assert [digest(a) for a in found] == [digest(a) for a in rounds("batched", world, FedAvg())[0]]


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_tf32_is_switched_on_for_the_run_alone_and_only_where_asked_for(precision: Any) -> None:
    b = torch.backends
    before = (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark)
    config = EngineConfig(name="batched", device="cpu", precision=precision)
    engine = BatchedEngine(config, toy.world().task, FedAvg(), LOCAL)
    engine.device = torch.device("cuda")
    with engine:
        within = (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark)
        assert within == (precision == "tf32", precision == "tf32", True)
    assert (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark) == before
