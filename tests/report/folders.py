"""Made-up run folders in the form that the chain writes, with numbers that one can check by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_fl.toml import dumps

NAMES = ("zero", "one", "two")


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_folder(
    root: Path, arm: str = "plain", seed: int = 0, *, accuracy: float = 0.5, stages: tuple[bool, bool] = (False, False),
    rounds: int = 4, names: Sequence[str] = NAMES, **final: Any,
) -> Path:  # fmt: skip
    """A finished run whose accuracy is ``accuracy`` in every round; ``final`` replaces keys of final.json."""
    n = len(names)
    folder = root / f"run{len(list(root.glob('run*')))}-{seed}"
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "name": arm,
        "seed": seed,
        "data": {"clients": 2},
        "federate": {"rounds": rounds, "local": {"lr": 0.1}},
    }
    if stages[0]:
        config["pretrain"] = {"steps": 300}
    if stages[1]:
        config["align"] = {"beta": 1.0}
    (folder / "config.toml").write_text(dumps(config))
    score = {"accuracy": accuracy, "class_weighted": accuracy, "many": 0.9, "medium": accuracy, "few": accuracy / 2}
    lines(
        folder / "rounds.jsonl",
        [{"round": t, "evaluated": True, **score, "train_loss": 1 / t, "rejected": 0} for t in range(1, rounds + 1)],
    )
    lines(
        folder / "clients.jsonl",
        [
            {"round": t, "client": k, "status": "ok", "reason": None, "bytes_up": 1000}
            for t in range(1, rounds + 1)
            for k in (0, 1)
        ],
    )
    lines(folder / "events.jsonl", [{"time": 0.0, "event": "finished"}])
    environment = {"commit": "abc123", "python": "3.11", "device": "cpu"}
    (folder / "env.json").write_text(json.dumps(environment))
    held = [[3, 1, 0] + [0] * (n - 3), [0, 1, 1] + [0] * (n - 3)]
    (folder / "federation.json").write_text(
        json.dumps({"dataset": "made up", "clients": [{"size": sum(h), "histogram": h} for h in held]})
    )
    record = {
        "experiment": "e", "name": folder.name, "arm": arm, "seed": seed, "config_hash": f"{arm[:4]}{seed}", "rounds": rounds,
        "algorithm": "fedavg", "class_names": list(names), "class_counts": [3, 2, 1] + [1] * (n - 3),
        "groups": {"rule": "one each", "many": [0], "medium": [1], "few": list(range(2, n))},
        "stages": {"pretrain": stages[0], "align": stages[1]}, "leaks": {"train/test": 0}, "environment": environment,
        "command": "mllm-fl run made-up.toml",
        "last": {**score, "per_class": [accuracy] * n, "confusion": [[8 if i == j else 1 for j in range(n)] for i in range(n)]},
        "mean_last": {"rounds": 20, "n": rounds, "mean": accuracy, "sd": 0.0}, "max": {"accuracy": accuracy, "round": 1},
        "ema": {"accuracy": accuracy}, "accuracy_before_align": accuracy - 0.1 if stages[1] else None,
        "align": {"source": "glyphs", "images": 30} if stages[1] else None, "bytes_up": 8000, "bytes_down": 8000,
        "seconds": {"clients": 1.0, "server": 0.5, "align": 0.0, "evaluate": 0.5, "total": 2.0}, "uploads_beyond_weights": "nothing",
    }  # fmt: skip
    (folder / "final.json").write_text(json.dumps(record | final))
    return folder
