"""What a node says about its clients in its answer to a round, and how the server reads it."""

from __future__ import annotations

from typing import Any

import torch

from mllm_fl.algorithms.base import Shard, Update
from mllm_fl.engines.base import Reply
from mllm_fl.engines.wire import Parcel
from mllm_fl.trees import Tree

POINTER = "remembered in round"  # the server's whole memory of a client: the node holds the rest


def pointer(kept: Tree) -> int:
    """The round whose memory of a client is the valid one; 0: it has none."""
    return int(kept[POINTER]) if POINTER in kept else 0


def failure(parcel: Parcel, client: int) -> str:
    """Why there is nothing for this client in an answer; "" where there is."""
    said = _about(parcel, client)
    return "its node did not answer for it" if said is None else str(said.get("problem", ""))[:200]


def _about(parcel: Parcel, client: int) -> dict[str, Any] | None:
    told = parcel.facts.get("told")
    rows = told if isinstance(told, list) else []
    return next((x for x in rows if isinstance(x, dict) and x.get("client") == client), None)


def told(client: int, update: Update, seconds: float, remembers: bool, lost: bool) -> dict[str, Any]:
    """The facts of a client's update, without its trees. ``lost``: it should have remembered something and did not."""
    metrics = {name: float(v) for name, v in update.metrics.items()}
    said = {"client": client, "weight": float(update.weight), "metrics": metrics, "seconds": seconds}
    return said | {"remembers": remembers, "lost": lost}


def trees(client: int, update: Update) -> dict[str, Tree]:
    """A client's update as the trees of an answer."""
    return {f"{client}/w": dict(update.w), f"{client}/extra": dict(update.extra)}


def reply_of(parcel: Parcel, shard: Shard) -> tuple[Reply, bool] | str:
    """A client's answer in the engine's form and whether it had lost its memory, or why it is none."""
    problem = failure(parcel, shard.client)
    said = _about(parcel, shard.client)
    if problem or said is None:
        return problem
    try:
        weight, seconds = float(said["weight"]), float(said["seconds"])
        metrics = {str(k): float(v) for k, v in said["metrics"].items()}
        remembers, lost = bool(said["remembers"]), bool(said.get("lost"))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return "its answer is not in our form"
    k = shard.client
    update = Update(k, parcel.trees.get(f"{k}/w", {}), weight, parcel.trees.get(f"{k}/extra", {}), metrics)
    kept = {POINTER: torch.tensor(shard.round)} if remembers else {}
    return Reply(k, update, kept, seconds), lost
