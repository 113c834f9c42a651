"""Stage 2, federated finetuning: the round loop, whatever the algorithm.

MLLM-LLaVA-FL (arXiv:2409.06067), §3.2: clients minimise their loss by local steps (eq. 3), the server averages what
the online clients send, weighted by their images (eq. 4); any method may take FedAvg's place. If stage 3 is on, every
aggregated model is aligned before it is evaluated and broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mllm_fl.algorithms.base import Server, Task
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import groups as groups_of
from mllm_fl.engines.base import Engine, open_engine
from mllm_fl.engines.memory import ClientMemory
from mllm_fl.engines.meter import Meter
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.runs import RunFolder
from mllm_fl.stages import continued
from mllm_fl.stages.align import Aligner
from mllm_fl.stages.round import concluded, played
from mllm_fl.stages.schedule import FederateConfig, online_clients
from mllm_fl.trees import Tree


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
    given = continued.given_inputs(task, federation, w, aligner, teacher or {})
    if checkpoint.exists():
        state, memory, lengths = continued.load(checkpoint, fresh, given, kept)
        run.event("resumed", round=state.round)
    else:
        memory = ClientMemory(kept)
    run.rewind(lengths)
    draws = online_clients(config, len(task.population), federation.manifest.seed, task.seed)
    note = ""
    groups, meter = groups_of(federation.class_counts), Meter()
    alone = aligner is not None and aligner.config.control == "alone"
    if state.round < config.rounds:
        progress(Event("federate", state.round, config.rounds, "the first round" if not state.round else "resumed"))
    for t, online in zip(range(1, config.rounds + 1), draws, strict=False):
        if t <= state.round:
            continue
        asked = [] if alone else online
        state, row, deployed = played(
            config, task, federation, state, memory, asked, run, engine, aligner, groups, teacher or {}, meter
        )
        if validation is not None:  # the model of the row's test accuracy
            row["validation"] = (
                engine.evaluate(deployed, validation).scores(None)["class_weighted"] if deployed else None
            )
        run.append("rounds.jsonl", [row])
        if t % config.checkpoint_every == 0 or t == config.rounds:
            continued.refuse_other_form(config.algorithm, state, fresh)
            continued.save(checkpoint, state, memory, run.lengths(), given)
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
