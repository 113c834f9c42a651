"""What a node knows about itself and keeps on its own disk: its configuration, its log, and what its clients remember between rounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.trees import Tree


@dataclass(frozen=True)
class Home:
    """What a node knows about itself, from ``--node-config``: it decides about its own images, not the server.

    ``site``: its name. ``state``: the folder for what it remembers. ``data``: its own images; absent: part ``partition_id`` of ``num_partitions`` of
    the data set that the configuration names, from ``root``. ``share_histogram``: whether the server may know its number of images of each class.
    """

    site: str
    state: Path
    data: str | None = None
    share_histogram: bool = False
    partition_id: int | None = None
    num_partitions: int | None = None
    root: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], node: int) -> Home:
        """From Flower's node configuration."""
        part, parts = (config.get(k) for k in ("partition-id", "num-partitions"))
        state = str(config.get("state", "")) or os.path.join(os.environ.get("FLWR_HOME", "."), f"mllm-fl-{node}")
        return cls(
            str(config.get("site", "")) or (f"site-{int(part) + 1}" if part is not None else ""),
            Path(state).expanduser(),
            str(config["data"]) if config.get("data") else None,
            config.get("share-histogram") in (True, "true", 1),
            int(part) if part is not None else None,
            int(parts) if parts is not None else None,
            str(config["root"]) if config.get("root") else None,
        )

    def log(self, what: str, **fields: Any) -> None:
        """One line to ``log.jsonl``, which stays on this machine."""
        with contextlib.suppress(OSError):
            self.state.mkdir(parents=True, exist_ok=True)
            with open(self.state / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"time": round(time.time(), 3), "what": what, **fields}) + "\n")


class Kept:
    """One client's memory in one run, on this machine: a file for each round after which it may be asked for again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, round: int) -> Tree | None:
        """What was remembered in ``round``; {} for round 0, which is before the first visit; None if it is lost."""
        from mllm_fl.engines.checkpoint import load_checkpoint

        if round == 0:
            return {}
        try:
            return load_checkpoint(self._file(round))[0]
        except UserError:
            return None

    def save(self, tree: Tree, round: int, before: int, checkpointed: int) -> None:
        """Keep ``tree``; what a server that falls back to its checkpoint cannot ask for any more is deleted."""
        from mllm_fl.engines.checkpoint import save_checkpoint

        if tree:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self._file(round), tree, {"round": round})
        if before <= checkpointed and self.folder.is_dir():
            for path in self.folder.glob("round-*.safetensors"):
                if int(re.sub(r"\D", "", path.stem)) < before:
                    path.unlink(missing_ok=True)

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"


def safe(name: object) -> str:
    """A run's name as a folder's."""
    text = re.sub(r"[^A-Za-z0-9._-]", "_", str(name)).lstrip(".")[:100]
    return text or "run"
