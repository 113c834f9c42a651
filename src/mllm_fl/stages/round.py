"""One round, and the survey after the last: ask the clients, check what they send, aggregate, align, evaluate, write the rows."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from mllm_fl.algorithms.base import Server, Shard, Task, Update
from mllm_fl.algorithms.refusal import why_answer_refused, why_refused
from mllm_fl.data.federation import Federation
from mllm_fl.data.longtail import Groups
from mllm_fl.engines.base import Engine
from mllm_fl.engines.guard import pure
from mllm_fl.engines.meter import Meter
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress
from mllm_fl.metrics import SCORES
from mllm_fl.runs import RunFolder
from mllm_fl.stages.align import Aligner, delivered
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.trees import Tree, nbytes


def played(
    config: FederateConfig,
    task: Task,
    federation: Federation,
    state: Server,
    memory: MutableMapping[int, Tree],
    online: list[int],
    run: RunFolder,
    engine: Engine,
    aligner: Aligner | None,
    groups: Groups,
    teacher: Mapping[int, Tensor],
    meter: Meter,
) -> tuple[Server, dict[str, Any], Tree | None]:
    """The state after the next round, the round's row, and the model that the row is about (None where none was evaluated)."""
    t = state.round + 1
    start = time.perf_counter()
    msg = config.method.broadcast(state)
    down = nbytes(msg.w) + nbytes(msg.extra)
    shards = [
        Shard(k, t, federation.client(k), task.seed, teacher.get(k)) for k in online if len(federation.clients[k])
    ]
    rows: list[dict[str, Any]] = []
    client_seconds = waited = 0.0

    def valid() -> Iterator[Update]:
        nonlocal client_seconds, waited
        replies = engine.clients(msg, shards, memory)
        while True:
            asked = time.perf_counter()
            reply = next(replies, None)
            waited += time.perf_counter() - asked
            if reply is None:
                return
            client_seconds += reply.seconds
            u = reply.update
            reason = why_refused(config.method, task, u, msg.w, config.limit)
            rows.append(
                {
                    "round": t,
                    "client": u.client,
                    "samples": len(federation.clients[u.client]),
                    "steps": int(u.metrics.get("steps", 0)),
                    "loss": _finite(u.metrics.get("loss")),
                    "weight": _finite(u.weight),
                    "status": "rejected" if reason else "ok",
                    "reason": reason,
                    "bytes_up": nbytes(u.w) + nbytes(u.extra),
                    "bytes_down": down,
                }
            )
            if reason:
                run.event("update rejected", round=t, client=u.client, reason=reason)
            else:
                memory[u.client] = reply.memory
                yield u

    updates = valid()
    first = next(updates, None)
    if first is None:
        if online:
            run.event("no valid update: the global weights stay", round=t)
        state = replace(state, round=t)
    else:
        state = replace(_aggregated(config, task, state, itertools.chain([first], updates), run), round=t)
    aggregated = time.perf_counter()
    evaluated = t % config.evaluate_every == 0 or t > config.rounds - config.evaluate_last
    before: dict[str, Any] = {}
    align_loss, every = None, aligner if aligner is not None and aligner.config.when == "every-round" else None
    if every is not None:
        if t == config.rounds:
            before = engine.evaluate(config.method.deploy(task, state), federation.test).scores(groups)
        w, align_loss = every(task, state.w, t)
        state = replace(state, w=w)
    deployed = (
        delivered(config.method, task, state, every) if evaluated else None
    )  # aligned once: the curve stays unaligned
    aligned = time.perf_counter()
    row: dict[str, Any] = {"round": t, "clients": online, "evaluated": evaluated}
    if deployed is not None:
        row |= engine.evaluate(deployed, federation.test).scores(groups)
    else:
        row |= dict.fromkeys(SCORES)
    ok = [r for r in rows if r["status"] == "ok"]
    missing = getattr(engine, "dropped", {})  # of an engine whose clients may not answer
    row |= {
        "train_loss": sum(r["loss"] * r["weight"] for r in ok if r["loss"] is not None) / sum(r["weight"] for r in ok)
        if ok
        else None,
        "bytes_up": sum(r["bytes_up"] for r in rows),
        "bytes_down": sum(r["bytes_down"] for r in rows),
        "rejected": len(rows) - len(ok),
        **({"dropped": {str(k): why for k, why in sorted(missing.items())}} if missing else {}),
        "accuracy_before_align": before.get("accuracy"),
        "align_loss": align_loss,
    }
    run.append("clients.jsonl", rows)
    now = time.perf_counter()
    run.append(
        "timings.jsonl",
        [
            {
                "round": t,
                "client_seconds": client_seconds,  # of all workers together
                "waited_seconds": waited,
                "server_seconds": aggregated - start - waited,
                "align_seconds": aligned - aggregated,
                "eval_seconds": now - aligned,
                **meter.lap(),
            }
        ],
    )
    return state, row, deployed


def _aggregated(config: FederateConfig, task: Task, state: Server, updates: Iterator[Update], run: RunFolder) -> Server:
    """The method's server step; what goes wrong in it is one line, its traceback an event."""
    try:
        with pure(config.method, "server", {"the server's weights": state.w, "the server's state": state.extra}):
            return config.method.server(task, state, updates)
    except UserError:
        raise
    except Exception as e:
        name = type(config.method).__name__
        run.event("server failed", round=state.round + 1, cause=traceback.format_exc())
        raise UserError(
            f"federate.algorithm: {name}",
            f"server failed in round {state.round + 1}: {type(e).__name__}: {e}",
            "its traceback is in events.jsonl; mend the cause, and the same command resumes",
        ) from e


def concluded(
    config: FederateConfig,
    task: Task,
    federation: Federation,
    state: Server,
    run: RunFolder,
    engine: Engine,
    progress: Progress,
) -> Server:
    """The state after every client that has images was asked about the final model; what they sent is counted in survey.json."""
    start, sent, refused, msg = time.perf_counter(), 0, 0, config.method.broadcast(state)
    asked = [
        Shard(k, state.round + 1, federation.client(k), task.seed) for k, held in enumerate(federation.clients) if held
    ]

    def answers() -> Iterator[tuple[int, Tree]]:
        nonlocal sent, refused
        for i, (k, answer) in enumerate(engine.survey(msg, asked)):
            sent += nbytes(answer)
            progress(Event("survey", i + 1, len(asked), "all clients answer"))
            if reason := why_answer_refused(config.method, task, answer):
                refused += 1
                run.event("answer refused", client=k, reason=reason)
            else:
                yield k, answer

    state = config.method.conclude(task, state, answers())
    seconds = time.perf_counter() - start
    down = len(asked) * (nbytes(msg.w) + nbytes(msg.extra))
    counted = {"clients": len(asked), "refused": refused, "bytes_up": sent, "bytes_down": down, "seconds": seconds}
    run.write_json("survey.json", counted)
    return state


def _finite(v: float | None) -> float | None:
    return float(v) if v is not None and np.isfinite(v) else None
