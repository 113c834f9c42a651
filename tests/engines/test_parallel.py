"""The parallel engine against the serial one: equal bytes whoever works, in whatever order, after whoever's death."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines.methods_of_a_user import Coloured, Dies, Raises, Remembers, Waits

from mllm_fl.algorithms import METHODS
from mllm_fl.algorithms.base import Algorithm, Broadcast, Shard
from mllm_fl.conformance import toy
from mllm_fl.conformance.row import row_of
from mllm_fl.conformance.toy import World
from mllm_fl.data.decode import EncodedPixels
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.engines import auto
from mllm_fl.engines.auto import AutoEngine
from mllm_fl.engines.base import Engine
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.parallel import ParallelEngine
from mllm_fl.engines.pool import Pool
from mllm_fl.engines.process import Process
from mllm_fl.engines.serial import SerialEngine
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree, digest, prefixed

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05)
Told = list[tuple[str, dict[str, Any]]]


def listening() -> tuple[Told, Any]:
    told: Told = []
    return told, lambda kind, **fields: told.append((kind, fields))


def play(engine: Engine, method: Algorithm, world: World, rounds: int = 2) -> tuple[Any, ...]:
    """Rounds with all clients, then the survey; digests of all that is sent, kept, measured and answered."""
    state, memory = method.init(world.task, world.w), {}  # type: ignore[var-annotated]
    seen: list[Any] = []
    for t in range(1, rounds + 1):
        shards = [world.shard(k, t, method.needs) for k in range(len(world.clients)) if len(world.clients[k])]
        replies = list(engine.clients(method.broadcast(state), shards, memory))
        memory |= {r.client: r.memory for r in replies}
        state = dataclasses.replace(method.server(world.task, state, [r.update for r in replies]), round=t)
        seen += [r.client for r in replies]
        seen.append(engine.evaluate(method.deploy(world.task, state), world.test).scores(None))
    shards = [world.shard(k, 9, method.needs) for k in range(len(world.clients)) if len(world.clients[k])]
    seen += [(k, digest(answer)) for k, answer in engine.survey(method.broadcast(state), shards)]
    remembered: Tree = {}
    for k, mine in memory.items():
        remembered |= prefixed(mine, f"{k}/")
    return digest(state.w), digest(state.extra), digest(remembered), seen


def serially(method: Algorithm, world: World, batch_norm: str = "average", rounds: int = 2) -> tuple[Any, ...]:
    with SerialEngine(EngineConfig(), world.task, method, LOCAL, batch_norm) as engine:
        return play(engine, method, world, rounds)


def test_four_workers_give_the_serial_engines_bytes_and_closing_leaves_none_behind() -> None:
    """Two workers are tried with every method below, one worker with a death."""
    world, method = toy.world(), Remembers()
    with ParallelEngine(EngineConfig(workers=4), world.task, method, LOCAL, "local") as engine:
        assert play(engine, method, world) == serially(method, world, "local")
        pids = [p.process.pid for p in engine.pool._processes if p is not None]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_too_many_workers_are_cut_and_an_event_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_fl.engines.cores.usable_cores", lambda: 1)
    world, (told, on_event) = toy.world(), listening()
    engine = ParallelEngine(EngineConfig(workers=100_000), world.task, Remembers(), LOCAL, on_event=on_event)
    assert engine.pool.workers == 4
    assert told == [("fewer workers", {"asked": 100_000, "started": 4})]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_serial_engines_bytes(name: str, pool: Pool) -> None:
    row = row_of(name)
    world, method = row.world(), row.rich
    with ParallelEngine(EngineConfig(), world.task, method, LOCAL, pool=pool) as engine:
        assert play(engine, method, world) == serially(method, world)


@pytest.mark.parametrize("slow", [0, 2])
def test_whoever_answers_last_the_order_is_the_clients(slow: int, pool: Pool) -> None:
    world, method = toy.world(), Waits(slow=slow)
    with ParallelEngine(EngineConfig(), world.task, method, LOCAL, pool=pool) as engine:
        assert play(engine, method, world) == serially(method, world)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_nothing_but_time_and_the_event_names_client_round_and_cause(
    tmp_path: Path, workers: int, pool: Pool
) -> None:
    world, (told, on_event) = toy.world(), listening()
    method = Dies(tally=str(tmp_path / "tally"))
    theirs = pool if workers == 2 else None
    with ParallelEngine(EngineConfig(workers=1), world.task, method, LOCAL, on_event=on_event, pool=theirs) as engine:
        assert play(engine, method, world) == serially(Remembers(), world)
    cause = "SIGKILL, as when memory runs out"
    assert told == [("worker died", {"client": 1, "round": 2, "cause": cause})]


def test_the_next_quick_client_lies_ready_and_a_long_one_stays_for_whoever_is_free(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, method, send = toy.world(), Remembers(), Process.give
    had: list[int] = []

    def give(process: Process, packed: bytes) -> None:
        had.append(len(process.under))
        send(process, packed)

    monkeypatch.setattr(Process, "give", give)
    for quick, most in ((1e9, 2), (0.0, 1)):
        monkeypatch.setattr("mllm_fl.engines.process.QUICK", quick)
        with ParallelEngine(EngineConfig(), world.task, method, LOCAL, pool=pool) as engine:
            engine.evaluate(world.w, world.test)  # a worker's last job says how long its next may take
            for _ in range(3):
                list(engine.clients(Broadcast(world.w, {}), [world.shard(k, 1, ()) for k in (0, 1, 2) * 3], {}))
            assert max(had[-9:]) == most
            assert play(engine, method, world) == serially(method, world)


def test_two_deaths_over_one_client_stop_the_run(tmp_path: Path, pool: Pool) -> None:
    world, (told, on_event) = toy.world(), listening()
    method = Dies(tally=str(tmp_path / "tally"), times=2)
    with ParallelEngine(EngineConfig(), world.task, method, LOCAL, on_event=on_event, pool=pool) as engine:
        with pytest.raises(UserError, match="client 1, round 2: two workers died over it: SIGKILL.*command resumes"):
            play(engine, method, world)
    assert [kind for kind, _ in told] == ["worker died"] * 2


@pytest.mark.parametrize("engine", ["serial", "parallel"])
def test_an_exception_names_client_and_round_and_its_traceback_is_kept(engine: str, pool: Pool) -> None:
    world, (told, on_event) = toy.world(), listening()
    args = (EngineConfig(), world.task, Raises(), LOCAL, "average", on_event)
    opened: Engine = ParallelEngine(*args, pool=pool) if engine == "parallel" else SerialEngine(*args)
    with opened, pytest.raises(UserError, match="client 2, round 1: ZeroDivisionError.*events.jsonl"):
        play(opened, Raises(), world)
    [(kind, fields)] = told
    assert (kind, fields["client"], fields["round"]) == ("client failed", 2, 1)
    assert "methods_of_a_user.py" in fields["cause"] and "weight=1 / (2 - local.client)" in fields["cause"]


def test_workers_are_fit_for_the_next_round_after_a_client_raised(pool: Pool) -> None:
    world = toy.world()
    with ParallelEngine(EngineConfig(), world.task, Raises(), LOCAL, pool=pool) as engine:
        for _ in range(2):
            with pytest.raises(UserError, match="ZeroDivisionError"):
                play(engine, Raises(), world)
    with ParallelEngine(EngineConfig(), world.task, Remembers(), LOCAL, pool=pool) as engine:
        assert play(engine, Remembers(), world) == serially(Remembers(), world)


def test_a_method_that_no_worker_can_import_is_told_so_before_any_client(pool: Pool) -> None:
    class Local(Algorithm):
        """Inside a function: there is nothing to import."""

    with pytest.raises(UserError, match="cannot be sent to a worker process.*in a module of its own"):
        ParallelEngine(EngineConfig(), toy.world().task, Local(), LOCAL, pool=pool).__enter__()


def test_a_method_of_the_script_itself_is_told_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker, ``__main__`` is the worker."""
    import __main__

    scripts = dataclasses.make_dataclass("Scripts", [], bases=(Algorithm,), frozen=True)
    scripts.__module__ = "__main__"
    monkeypatch.setattr(__main__, "Scripts", scripts, raising=False)
    with ParallelEngine(EngineConfig(), toy.world().task, scripts(), LOCAL, pool=pool) as engine:
        with pytest.raises(UserError, match=r"cannot be sent to a worker process.*__main__.*in a module of its own"):
            play(engine, scripts(), toy.world())


def test_auto_begins_serially_and_ends_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    world, method = toy.world(), Remembers()
    monkeypatch.setattr(auto, "PATIENCE", 0.0)
    with AutoEngine(EngineConfig(workers=2), world.task, method, LOCAL) as engine:
        assert engine.parallel is None
        assert play(engine, method, world) == serially(method, world)
        assert engine.parallel is not None
        assert sum(engine.parallel.pool.busy) > 0


def test_auto_stays_serial_for_little_work_and_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Algorithm):
        """Inside a function: there is nothing to import."""

    world, (told, on_event) = toy.world(), listening()
    with AutoEngine(EngineConfig(workers=2), world.task, Remembers(), LOCAL) as engine:
        play(engine, Remembers(), world)
        assert engine.parallel is None
    monkeypatch.setattr(auto, "PATIENCE", 0.0)
    with AutoEngine(EngineConfig(workers=2), world.task, Local(), LOCAL, on_event=on_event) as engine:
        assert play(engine, Local(), world) == serially(Local(), world)
        assert engine.parallel is None
    assert [kind for kind, _ in told] == ["stays serial"]


def test_images_beyond_a_megabyte_lie_in_memory_that_workers_share(pool: Pool) -> None:
    """They travel once, by number; the tensor keeps its values and every other reference to it sees them too."""
    world = toy.world()
    many = ImageSet(
        "many", MemoryPixels(torch.randint(0, 256, (6000, 3, 8, 8), dtype=torch.uint8)), world.test.labels, ()
    )  # type: ignore[arg-type]
    many = dataclasses.replace(many, labels=torch.arange(6000).numpy() % 3, class_names=world.test.class_names)
    assert isinstance(many.pixels, MemoryPixels)
    before = many.pixels.tensor.clone()
    method = Remembers()
    shards = [Shard(k, 1, many.subset(list(range(k * 20, k * 20 + 20))), 0) for k in range(3)]
    results = []
    encoded = EncodedPixels(Coloured(400), 8)
    from_disk = ImageSet("encoded", encoded, np.arange(400) % 3, world.test.class_names)
    for engine in (
        SerialEngine(EngineConfig(), world.task, method, LOCAL),
        ParallelEngine(EngineConfig(), world.task, method, LOCAL, pool=pool),
    ):
        with engine:
            replies = list(engine.clients(Broadcast(world.w, {}), shards, {}))
            results.append(
                [digest(r.update.w) for r in replies]
                + [str(engine.evaluate(world.w, x).scores(None)) for x in (many, from_disk)]
            )
    assert results[0] == results[1]
    assert id(many.pixels) in pool.shelf.numbers
    assert id(encoded) in pool.shelf.numbers
    assert torch.equal(many.pixels.tensor, before)


def test_two_engines_take_turns_on_one_pool(pool: Pool) -> None:
    """Each trains with its own method and precision, whoever used the workers last."""
    world = toy.world()
    kinds = [(Remembers(), world.task), (Algorithm(), dataclasses.replace(world.task, precision="bf16"))]
    one, other = (ParallelEngine(EngineConfig(), task, method, LOCAL, pool=pool) for method, task in kinds)
    with one, other:
        for _ in range(2):
            for engine, (method, task) in zip((one, other), kinds, strict=True):
                here = dataclasses.replace(world, task=task)
                assert play(engine, method, here, rounds=1) == serially(method, here, rounds=1)


def test_a_server_that_stops_in_the_middle_of_a_round_leaves_workers_free(pool: Pool) -> None:
    world, method = toy.world(), Remembers()
    with ParallelEngine(EngineConfig(), world.task, method, LOCAL, pool=pool) as engine:
        replies = engine.clients(Broadcast(world.w, {}), [world.shard(k, 1, ()) for k in range(3)], {})
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        assert play(engine, method, world) == serially(method, world)


def test_orphans_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """The parent is a process of its own here; it is killed while its workers sleep in the middle of a client."""
    import signal
    import subprocess
    import sys

    code = (
        "from tests.engines.test_parallel import *\n"
        "world = toy.world()\n"
        "engine = ParallelEngine(EngineConfig(workers=1), world.task, Waits(slow=0, seconds=600), LOCAL).__enter__()\n"
        "engine.prove()\n"
        "print(engine.pool._processes[0].process.pid, flush=True)\n"
        "list(engine.clients(Broadcast(world.w, {}), [world.shard(0, 1, ())], {}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(3000):  # until it is gone or a zombie that somebody else has to bury
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the worker outlived its parent")
