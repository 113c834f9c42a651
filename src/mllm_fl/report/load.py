"""Run folders as the report reads them: finished runs, and a word on those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.runs import read_json, read_rows
from mllm_fl.toml import flatten, read_toml


@dataclass(frozen=True)
class RunView:
    """One finished run: its final record, rows, configuration (dotted keys) and, where written, who holds what."""

    path: Path
    final: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    config: dict[str, Any]
    federation: dict[str, Any] | None

    @property
    def arm(self) -> str:
        """The arm's name."""
        return str(self.final["arm"])


NEEDED = ("arm", "seed", "last", "class_names", "groups", "stages")


def load_runs(folders: Sequence[Path]) -> tuple[list[RunView], list[Path]]:
    """(finished runs in the order given, folders of unfinished ones).

    Raises:
        UserError: no finished run, a record that lacks what the report needs, a broken line, or runs with different classes.
    """
    views: list[RunView] = []
    unfinished: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(folder, "no such run folder")
        if not (folder / "final.json").exists():
            unfinished.append(folder)
            continue
        final = read_json(folder / "final.json")
        missing = [k for k in NEEDED if k not in final]
        if missing or not isinstance(final["last"], dict):
            raise UserError(
                folder / "final.json", f"lacks {missing or ['last']}", "it was not written by this version; run again"
            )
        config = flatten(read_toml(folder / "config.toml")) if (folder / "config.toml").exists() else {}
        federation = read_json(folder / "federation.json") if (folder / "federation.json").exists() else None
        rows, clients = read_rows(folder / "rounds.jsonl"), read_rows(folder / "clients.jsonl")
        views.append(RunView(folder, final, rows, clients, config, federation))
    if not views:
        where = folders[0] if folders else Path()
        raise UserError(
            where, "no finished run here (no final.json)", "wait for a run to finish, or start one: mllm-fl run CONFIG"
        )
    names = views[0].final["class_names"]
    for v in views:
        if v.final["class_names"] != names:
            raise UserError(v.path, f"has other classes than {views[0].path}", "make a report for each data set")
    return views, unfinished


def by_arm(views: Sequence[RunView]) -> dict[str, list[RunView]]:
    """The runs of each arm, in the order in which the arms first appear."""
    out: dict[str, list[RunView]] = {}
    for v in views:
        out.setdefault(v.arm, []).append(v)
    return out


def config_differences(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each arm's first run) for every key that is not equal in all arms; seeds and names left out."""
    firsts = [runs[0] for runs in by_arm(views).values()]
    keys = sorted({k for v in firsts for k in v.config} - {"name", "seed"})
    rows = [(k, [str(v.config.get(k, "–")) for v in firsts]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]
