"""What a pretraining keeps on the disk while it runs: the curve, and a checkpoint from which the same call ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mllm_fl.engines.checkpoint import fit, load_checkpoint, save_checkpoint
from mllm_fl.errors import UserError
from mllm_fl.runs import differences
from mllm_fl.stages.pretraining.learner import Learner
from mllm_fl.trees import clone, prefixed, under

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Store:
    """``pretrain.jsonl``, a row a step, and ``checkpoint.safetensors`` in ``folder``; ``what``: what the weights depend on."""

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.curve, self.checkpoint, self.folder, self.what = (
            folder / "pretrain.jsonl",
            folder / "checkpoint.safetensors",
            folder,
            what,
        )
        self.rows: list[dict[str, Any]] = []

    def save(self, learner: Learner, step: int, seconds: float) -> None:
        """Rows first, then the checkpoint that counts them: whatever is killed, rows beyond the count are cut off later."""
        with open(self.curve, "ab") as f:
            f.write("".join(json.dumps(r) + "\n" for r in self.rows).encode())
        self.rows = []
        tensors = prefixed(learner.network.state_dict(), "network.")
        for name, p in learner.trainable.items():
            for k in MOMENTS:
                if k in learner.optimiser.state[p]:  # a parameter that the loss does not reach has no moments
                    tensors[f"adam.{k}.{name}"] = learner.optimiser.state[p][k]
        record = {"step": step, "rows": self.curve.stat().st_size, "seconds": seconds, "what": self.what}
        save_checkpoint(self.checkpoint, {k: v.cpu() for k, v in tensors.items()}, record)

    def clean(self) -> None:
        """Remove what a killed process left half-written: the lock says that nobody writes here now."""
        for leftover in self.folder.glob(".*.tmp-*"):
            leftover.unlink()
        if not self.checkpoint.exists():
            self.curve.unlink(missing_ok=True)

    def resume(self, learner: Learner, writes: bool) -> tuple[int, float]:
        """(steps, seconds) that are done; puts weights and optimiser, and if this process ``writes`` the curve, back to where they were then.

        Raises:
            UserError: another pretraining's checkpoint, or a curve that is shorter than it was.
        """
        if not self.checkpoint.exists():
            return 0, 0.0
        tensors, record = load_checkpoint(self.checkpoint)
        same(self.checkpoint, self.what, record["what"])
        like = clone(learner.network.state_dict())
        learner.network.load_state_dict(fit(under(tensors, "network."), like, self.checkpoint))
        for name, p in learner.trainable.items():
            moments = {k: tensors[f"adam.{k}.{name}"].to(p.device) for k in MOMENTS if f"adam.{k}.{name}" in tensors}
            if "exp_avg" in moments:
                moments["step"] = torch.tensor(float(record["step"]))
            if moments:
                learner.optimiser.state[p] = moments
        if writes:
            have = self.curve.stat().st_size if self.curve.exists() else 0
            if have < record["rows"]:
                raise UserError(
                    self.curve,
                    f"has {have} bytes, the checkpoint was written when it had {record['rows']}",
                    f"delete {self.folder}",
                )
            with open(self.curve, "ab") as f:
                f.truncate(record["rows"])
        return int(record["step"]), float(record["seconds"])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder``; refuse when another process does."""
    lock = FileLock(str(folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(folder, "another process is pretraining in this folder", "wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def same(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse weights that were made otherwise; a teacher that is not on this machine now is not compared."""
    if now["teacher"] is None:
        now, then = ({k: v for k, v in w.items() if k != "teacher"} for w in (now, then))
    diff = differences(then, json.loads(json.dumps(now)))
    if diff:
        raise UserError(
            path, f"was made with other settings: {'; '.join(diff)}", f"delete {path.parent}, or use another folder"
        )
