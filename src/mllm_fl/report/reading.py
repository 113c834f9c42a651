"""Run folders as the page needs them: read, checked, and grouped into arms over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.report.checks import WAY_OUT, check_federation, check_final
from mllm_fl.report.table import group
from mllm_fl.runs import read_json, read_rows
from mllm_fl.toml import build as build_config
from mllm_fl.toml import flatten, read_toml


@dataclass(frozen=True)
class Run:
    """One finished run: final.json and what lies beside it. ``config`` is flat, by dotted keys.

    ``federation``: who holds what, as `mllm-fl data describe --json` prints it; empty where the run did not record it.
    """

    folder: Path
    final: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    clients: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    federation: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The seed that final.json names, -1 where it names none."""
        seed = self.final.get("seed")
        return seed if isinstance(seed, int) else -1

    @property
    def label(self) -> str:
        """Arm and seed."""
        return (
            f"{self.final.get('arm') or self.final.get('name') or self.folder.name}, seed {self.final.get('seed', '–')}"
        )


@dataclass(frozen=True)
class Unfinished:
    """A run without final.json: how far it is."""

    folder: Path
    name: str
    done: int
    rounds: int | None
    accuracy: float | None


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed only; ``index`` picks colour and dash."""

    name: str
    index: int
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run whose texts stand for all."""
        return self.runs[0]


@dataclass(frozen=True)
class Found:
    """All that the page is about."""

    arms: tuple[Arm, ...]
    unfinished: tuple[Unfinished, ...]
    class_names: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The finished runs, arm by arm."""
        return tuple(run for arm in self.arms for run in arm.runs)


def read(folders: Sequence[Path]) -> Found:
    """Read run folders.

    Raises:
        UserError: none given, none finished, not a run folder, a broken file or line, or runs with different classes.
    """
    if not folders:
        raise UserError("report", "no run folder given", "give folders under runs/")
    runs: list[Run] = []
    unfinished: list[Unfinished] = []
    for folder in {Path(f).resolve(): Path(f) for f in folders}.values():
        if not folder.is_dir():
            raise UserError(folder, "no such folder", "give a folder under runs/")
        finals = [folder / n for n in ("final.json", "aligned.json") if (folder / n).exists()]
        if folder / "final.json" in finals:
            runs += [_finished(folder, path) for path in finals]
        else:
            unfinished.append(_unfinished(folder))
    if not runs:
        raise UserError(
            unfinished[0].folder, f"none of {len(unfinished)} runs is finished", "the command that began it resumes it"
        )
    return Found(_arms(runs), tuple(unfinished), _same_classes(runs))


def _finished(folder: Path, path: Path) -> Run:
    final = _object(path)
    check_final(final, path)
    aligned = path.name == "aligned.json"  # of `mllm-fl align`: one more number, but no rounds of its own
    federation = _optional(folder / "federation.json") or _counted(folder)
    check_federation(federation, len(final["class_names"]), folder / "federation.json")
    environment = _optional(folder / "env.json") or final.get("environment")
    return Run(
        folder,
        final,
        () if aligned else tuple(_rows(folder / "rounds.jsonl")),
        () if aligned else tuple(_rows(folder / "clients.jsonl")),
        () if aligned else tuple(_rows(folder / "events.jsonl")),
        flatten(read_toml(folder / "config.toml")) if (folder / "config.toml").exists() else {},
        federation,
        environment if isinstance(environment, dict) else {},
    )


def _unfinished(folder: Path) -> Unfinished:
    config = flatten(read_toml(folder / "config.toml")) if (folder / "config.toml").exists() else {}
    if not config and not (folder / "rounds.jsonl").exists():
        raise UserError(folder, "not a run folder (neither final.json nor config.toml)", "give a folder under runs/")
    whole = (folder / "rounds.jsonl").exists() and (folder / "rounds.jsonl").read_bytes()
    rows = _rows(folder / "rounds.jsonl", torn=bool(whole and not whole.endswith(b"\n")))
    seen = [r["accuracy"] for r in rows if isinstance(r.get("accuracy"), float | int)]
    rounds = config.get("federate.rounds")
    label = f"{config.get('name', folder.name)}, seed {config.get('seed', '–')}"
    return Unfinished(
        folder, label, len(rows), rounds if isinstance(rounds, int) else None, float(seen[-1]) if seen else None
    )


def _rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Objects, a line each; ``torn`` leaves out the last line, which a running or killed process has not ended."""
    if torn:
        import json

        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}", "is not a JSON object", WAY_OUT)
        if path.name != "events.jsonl" and type(row.get("round")) is not int:
            raise UserError(f"{path}:{number}", "names no round", WAY_OUT)
    return rows


def _object(path: Path) -> dict[str, Any]:
    value: Any = read_json(path)
    if not isinstance(value, dict):
        raise UserError(path, "is not a JSON object", WAY_OUT)
    return value


def _optional(path: Path) -> dict[str, Any]:
    return _object(path) if path.exists() else {}


def _counted(folder: Path) -> dict[str, Any]:
    """Who holds what for a run that wrote manifest.json only: indices counted by the labels of the data, if it is here and the same."""
    manifest = _optional(folder / "manifest.json")
    if not manifest or not (folder / "config.toml").exists():
        return {}
    from mllm_fl.data.config import DataConfig
    from mllm_fl.data.describe import summary
    from mllm_fl.data.federation import build as build_federation

    try:
        config = build_config(
            DataConfig, read_toml(folder / "config.toml").get("data", {}), str(folder / "config.toml"), "data."
        )
        federation = build_federation(config)
    except UserError:  # the data set is not on this machine: the page says that it is not known
        return {}
    return summary(federation) if federation.manifest.sha256 == manifest.get("sha256") else {}


def _same_classes(runs: Sequence[Run]) -> tuple[str, ...]:
    names = list(runs[0].final["class_names"])
    for run in runs:
        other = list(run.final["class_names"])
        if other != names:
            raise UserError(
                run.folder,
                f"its classes ({len(other)}: {', '.join(other[:3])} …) are not those of {runs[0].folder.name} "
                f"({len(names)}: {', '.join(names[:3])} …)",
                "make a report for each set of classes",
            )
    return tuple(names)


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    by_final = {id(run.final): run for run in runs}
    arms = []
    for i, (label, finals) in enumerate(group([run.final for run in runs]).items()):
        members = sorted((by_final[id(f)] for f in finals), key=lambda run: run.seed)
        arms.append(Arm(label, i, tuple(members)))
    return tuple(arms)
