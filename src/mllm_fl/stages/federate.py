"""Stage 2, federated finetuning: the round loop, whatever the algorithm.

MLLM-LLaVA-FL (arXiv:2409.06067), §3.2: clients minimise their loss by local steps (eq. 3), the server averages what
the online clients send, weighted by their images (eq. 4); any method may take FedAvg's place. If stage 3 is on, every
aggregated model is aligned before it is evaluated and broadcast.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mllm_fl.algorithms import find
from mllm_fl.algorithms.base import Algorithm, FedAvg, Server, Shard, Task, Update
from mllm_fl.algorithms.refusal import why_answer_refused, why_refused
from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import Groups
from mllm_fl.data.longtail import groups as groups_of
from mllm_fl.data.manifest import sha256_of
from mllm_fl.engines.base import Engine, open_engine
from mllm_fl.engines.checkpoint import fit, load_checkpoint, save_checkpoint
from mllm_fl.engines.config import EngineConfig
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.guard import pure
from mllm_fl.engines.local import LocalConfig
from mllm_fl.engines.memory import ClientMemory
from mllm_fl.engines.meter import Meter
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.metrics import SCORES, Evaluation, summarise
from mllm_fl.runs import RunFolder, differences, read_json, read_rows
from mllm_fl.seeds import numpy_stream
from mllm_fl.stages.align import Aligner, delivered
from mllm_fl.stages.server import ServerConfig
from mllm_fl.trees import Tree, digest, nbytes, prefixed, under


@dataclass(frozen=True)
class FederateConfig:
    """``[federate]``: the federation's schedule. ``[federate.method]`` holds the algorithm's own fields.

    ``sampling``: "creff" draws the online clients from one legacy NumPy stream seeded with the data seed, as CReFF's code
    does; "uniform" from the named stream (run, "sampling", round). Evaluated every ``evaluate_every`` rounds and in each of the
    last ``evaluate_last``; ``report_last``: the last rounds whose evaluated ones make the mean that a run is quoted with.
    ``limit``: an update with a value beyond it in magnitude is dropped.
    ``validation_per_class``: held-out server images of every class by which a round is chosen (stages/validation.py); absent: none.
    """

    algorithm: str = "fedavg"
    rounds: int = 200
    clients_per_round: int = 8
    sampling: Literal["creff", "uniform"] = "creff"
    evaluate_every: int = 1
    evaluate_last: int = 10
    report_last: int = 20
    checkpoint_every: int = 1
    limit: float = 1e6
    validation_per_class: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    method: Algorithm = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        for name in ("rounds", "clients_per_round", "evaluate_every", "checkpoint_every", "report_last"):
            if getattr(self, name) < 1:
                raise UserError(f"federate.{name}", f"{getattr(self, name)} is below 1")
        if self.validation_per_class is not None and self.validation_per_class < 1:
            raise UserError("federate.validation_per_class", f"{self.validation_per_class} is below 1", "leave it out")
        if not isinstance(self.method, find(self.algorithm)):
            raise UserError(
                "federate.method", f"holds a {type(self.method).__name__}, but federate.algorithm is {self.algorithm!r}"
            )


def online_clients(config: FederateConfig, clients: int, data_seed: int, seed: int) -> Iterator[list[int]]:
    """The clients of round 1, 2, ..., each a sorted list of ``clients_per_round`` distinct clients."""
    legacy = np.random.RandomState(data_seed)
    for t in itertools.count(1):
        if config.sampling == "creff":
            chosen = legacy.choice(clients, config.clients_per_round, replace=False)
        else:
            chosen = numpy_stream(seed, "sampling", t).choice(clients, config.clients_per_round, replace=False)
        yield sorted(int(k) for k in chosen)


def federate(
    config: FederateConfig,
    task: Task,
    federation: Federation,
    w: Tree,
    run: RunFolder,
    *,
    batch_norm: str = "average",
    aligner: Aligner | None = None,
    teacher: Mapping[int, Tensor] | None = None,
    progress: Progress = silent,
    engine: Engine | None = None,
    validation: ImageSet | None = None,
) -> Server:
    """Run or resume the rounds from the weights ``w``; rows go to the run folder as they come.

    ``teacher``: each client's rows of the frozen teacher's zero-shot logits, for methods that need them. ``validation``: held-out images, scored beside the
    test images. ``engine``: one that is open already; else the one that ``config.engine`` names, for the time of this call.

    Returns the server's state after the last round, and after the survey if the method ``concludes``. Killed at any moment and called again with the same arguments, it
    ends with the same bytes in its weights, rounds.jsonl and clients.jsonl.

    Raises:
        UserError: more online clients than clients; a checkpoint that is damaged, of another model, or begun with other inputs.
    """
    if engine is None:
        with open_engine(config.engine, task, config.method, config.local, batch_norm, run.event) as opened:
            return federate(
                config,
                task,
                federation,
                w,
                run,
                batch_norm=batch_norm,
                aligner=aligner,
                teacher=teacher,
                progress=progress,
                engine=opened,
                validation=validation,
            )
    if config.clients_per_round > len(task.population):
        raise UserError(
            "federate.clients_per_round",
            f"{config.clients_per_round} online clients, but the federation has {len(task.population)}",
        )
    state = fresh = config.method.init(task, w)
    checkpoint, kept = run.path / "checkpoint.safetensors", run.path / "memory"
    lengths: dict[str, int] = {}
    given = _given(task, federation, w, aligner, teacher or {})
    if checkpoint.exists():
        state, memory, lengths = _load(checkpoint, fresh, given, kept)
        run.event("resumed", round=state.round)
    else:
        memory = ClientMemory(kept)
    run.rewind(lengths)
    draws = online_clients(config, len(task.population), federation.manifest.seed, task.seed)
    note = ""
    groups, meter = groups_of(federation.class_counts), Meter()
    alone = aligner is not None and aligner.config.control == "alone"
    for t, online in zip(range(1, config.rounds + 1), draws, strict=False):
        if t <= state.round:
            continue
        asked = [] if alone else online
        state, row, deployed = _round(
            config, task, federation, state, memory, asked, run, engine, aligner, groups, teacher or {}, meter
        )
        if validation is not None:  # the model of the row's test accuracy
            row["validation"] = (
                engine.evaluate(deployed, validation).scores(None)["class_weighted"] if deployed else None
            )
        run.append("rounds.jsonl", [row])
        if t % config.checkpoint_every == 0 or t == config.rounds:
            _refuse_other_form(config.algorithm, state, fresh)
            _save(checkpoint, state, memory, run.lengths(), given)
            memory.prune()
        if row["accuracy"] is not None:
            note = f"accuracy {row['accuracy']:.1%}"
        progress(Event("federate", t, config.rounds, note))
    if not config.method.concludes:
        return state
    end = concluded(config, task, federation, state, run, engine, progress)
    if aligner is not None and aligner.config.when == "every-round":
        end = replace(end, w=aligner.rest(task, end.w, state.w, state.round))
    return end


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


def _round(
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


def _finite(v: float | None) -> float | None:
    return float(v) if v is not None and np.isfinite(v) else None


def _given(
    task: Task, federation: Federation, w: Tree, aligner: Aligner | None, teacher: Mapping[int, Tensor]
) -> dict[str, str]:
    """What the rounds depend on beside the configuration, as SHA-256: a checkpoint is continued with equal inputs only."""
    given = {"w0": digest(w), "manifest": federation.manifest.sha256}
    if aligner is not None:
        given |= {
            f"align.{k}": digest({k: v}) for k, v in (("x", aligner.x), ("y", aligner.y), ("q", aligner.q_logits))
        }
    for name, images in (("unlabelled", task.unlabelled), ("labelled", task.labelled)):
        if images is not None:
            given[name] = sha256_of([pixel_hashes(images), images.labels.tolist()])
    if task.texts is not None:
        given["texts"] = digest({"texts": task.texts})
    if teacher:
        given["teacher"] = digest({str(k): v for k, v in teacher.items()})
    return given


def _refuse_other_form(algorithm: str, state: Server, fresh: Server) -> None:
    """The server's extra leaves keep the names, shapes and dtypes that ``init`` gave them, or no checkpoint could be checked."""
    forms = [{k: (tuple(v.shape), v.dtype) for k, v in s.extra.items()} for s in (state, fresh)]
    other = sorted(k for k in forms[0].keys() | forms[1].keys() if forms[0].get(k) != forms[1].get(k))
    if other:
        raise UserError(
            f"federate.algorithm: {algorithm}",
            f"Server.extra[{other[0]!r}] has another form after round {state.round} than after init",
            "give every leaf its name, shape and dtype in init",
        )


def _save(path: Path, state: Server, memory: ClientMemory, lengths: dict[str, int], given: dict[str, str]) -> None:
    tensors = prefixed(state.w, "w/") | prefixed(state.extra, "extra/") | {"memory": memory.commit(state.round)}
    save_checkpoint(path, tensors, {"round": state.round, "lengths": lengths, "given": given})


def _load(path: Path, fresh: Server, given: dict[str, str], kept: Path) -> tuple[Server, ClientMemory, dict[str, int]]:
    tensors, record = load_checkpoint(path)
    w = fit(under(tensors, "w/"), fresh.w, path)
    like = prefixed(fresh.extra, "extra/")
    extra = under(fit({k: v for k, v in tensors.items() if k.startswith("extra/")}, like, path), "extra/")
    diff = differences(record.get("given", {}), given)
    if diff:
        problem = f"was begun with other inputs (SHA-256): {'; '.join(diff)}"
        raise UserError(path, problem, "restore them, or delete the run folder")
    memory = ClientMemory(kept, int(record["round"]), tensors.get("memory"))
    for k in record.get("remembering", ()):  # of a checkpoint that held the clients' memories itself
        memory[int(k)] = under(tensors, f"memory/{k}/")
    return Server(w, extra, int(record["round"])), memory, record["lengths"]


def outcome(
    config: FederateConfig,
    task: Task,
    state: Server,
    test: ImageSet,
    groups: Groups,
    run: RunFolder,
    aligner: Aligner | None = None,
    engine: Engine | None = None,
    shipped: Tree | None = None,
) -> dict[str, Any]:
    """The numbers of a finished run, for final.json: last, mean of the last ``report_last`` rounds, maximum, EMA, bytes, seconds.

    ``last`` is the model that is ``shipped``, by default :func:`mllm_fl.stages.align.delivered`. ``curve`` says which models the other three describe: "plain", "aligned", or "unaligned" where
    the model was aligned once after the last round. ``deployed_otherwise``: leaves in which the shipped model is not the one that
    is broadcast, because the method deploys its own in their place or transforms them; they are aligned too.
    """
    rows, timings = read_rows(run.path / "rounds.jsonl"), read_rows(run.path / "timings.jsonl")
    plain = config.method.deploy(task, state)
    deployed = shipped if shipped is not None else delivered(config.method, task, state, aligner)
    once = aligner is not None and aligner.config.when == "end"

    def score(w: Tree) -> Evaluation:
        return engine.evaluate(w, test) if engine is not None else evaluate(task, w, test)

    confusion = score(deployed)
    surveyed = read_json(run.path / "survey.json") if config.method.concludes else {}
    seconds = {
        name: sum(r.get(f"{key}_seconds", r["client_seconds"]) for r in timings)
        for name, key in (("clients", "waited"), ("server", "server"), ("align", "align"), ("evaluate", "eval"))
    }
    seconds["server"] += surveyed.get("seconds", 0.0)
    return {
        "algorithm": config.algorithm,
        "rounds": config.rounds,
        "class_names": list(task.class_names),
        "last": confusion.scores(groups) | {"confusion": confusion.counts.tolist()},
        **summarise([(r["round"], r["accuracy"]) for r in rows if r["accuracy"] is not None], last=config.report_last),
        "curve": "plain" if aligner is None else "unaligned" if once else "aligned",
        "deployed_otherwise": [k for k, v in plain.items() if k not in state.w or not torch.equal(v, state.w[k])],
        "accuracy_before_align": score(plain).scores(None)["accuracy"] if once else rows[-1]["accuracy_before_align"],
        "bytes_up": sum(r["bytes_up"] for r in rows) + surveyed.get("bytes_up", 0),
        "bytes_down": sum(r["bytes_down"] for r in rows) + surveyed.get("bytes_down", 0),
        "rejected": sum(r["rejected"] for r in rows),
        "seconds": seconds,
        "method": vars(config.method) | {},
        "weights_sha256": digest(deployed),
        "uploads_beyond_weights": type(config.method).uploads,
    }
