"""A federation goes on where it stood: what a checkpoint holds, and what has to be equal for it to be taken up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mllm_fl.algorithms.base import Server, Task
from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.federation import Federation
from mllm_fl.data.manifest import sha256_of
from mllm_fl.engines.checkpoint import fit, load_checkpoint, save_checkpoint
from mllm_fl.engines.memory import ClientMemory
from mllm_fl.errors import UserError
from mllm_fl.runs import differences
from mllm_fl.stages.align import Aligner
from mllm_fl.trees import Tree, digest, prefixed, under


def given_inputs(
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


def refuse_other_form(algorithm: str, state: Server, fresh: Server) -> None:
    """The server's extra leaves keep the names, shapes and dtypes that ``init`` gave them, or no checkpoint could be checked."""
    forms = [{k: (tuple(v.shape), v.dtype) for k, v in s.extra.items()} for s in (state, fresh)]
    other = sorted(k for k in forms[0].keys() | forms[1].keys() if forms[0].get(k) != forms[1].get(k))
    if other:
        raise UserError(
            f"federate.algorithm: {algorithm}",
            f"Server.extra[{other[0]!r}] has another form after round {state.round} than after init",
            "give every leaf its name, shape and dtype in init",
        )


def save(path: Path, state: Server, memory: ClientMemory, lengths: dict[str, int], given: dict[str, str]) -> None:
    tensors = prefixed(state.w, "w/") | prefixed(state.extra, "extra/") | {"memory": memory.commit(state.round)}
    save_checkpoint(path, tensors, {"round": state.round, "lengths": lengths, "given": given})


def load(path: Path, fresh: Server, given: dict[str, str], kept: Path) -> tuple[Server, ClientMemory, dict[str, int]]:
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
