"""Watch a run from its folder: what was finished, what it waits for, who was dropped, and where it can be taken up again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mllm_fl.deployment import control
from mllm_fl.deployment.layout import Layout, typed
from mllm_fl.deployment.processes import Say
from mllm_fl.deployment.server import Settings
from mllm_fl.deployment.sites import read_sites
from mllm_fl.errors import UserError
from mllm_fl.runs import read_json, read_rows

STALE = 30.0  # seconds without news after which the SuperLink is asked


def settings_of(made: Layout, **values: Any) -> dict[str, Any]:
    """The run configuration that ``mllm-fl deploy run`` submits for this deployment."""
    own = {
        "config": str(made.folder / "run.toml"),
        "sites": str(made.sites_json),
        "runs": str(made.folder / "runs"),
        "images": made.images,
    }
    return own | {k: v for k, v in values.items() if v is not None}


def path_of(made: Layout, values: dict[str, Any]) -> Path:
    """The run folder that these values name.

    Raises:
        UserError: as :meth:`Settings.resolved`.
    """
    from mllm_fl.stages.chain import run_path

    settings = Settings.of(values)
    return run_path(settings.resolved(len(made.sites)), Path(settings.runs))


def start(made: Layout, values: dict[str, Any], say: Say) -> tuple[Path, str]:
    """Submit the run; its folder and its number at the SuperLink."""
    path = path_of(made, values)
    (path / "status.json").unlink(missing_ok=True)
    run = control.submit(made, values)
    say(f"run {path} (number {run} at the SuperLink)")
    return path, run


def resume(path: Path, say: Say) -> tuple[Layout, Path, str]:
    """Submit the run of this folder again; it continues after its last checkpoint.

    Raises:
        UserError: not a run of a federation, or already finished.
    """
    if (path / "final.json").exists():
        raise UserError(path, "has finished", "nothing to resume")
    if not (path / "deployment.json").exists():
        raise UserError(path, "no deployment.json here: not a run of a federation", "give DIR/runs/EXPERIMENT/NAME")
    begun = read_json(path / "deployment.json")
    values = dict(begun["settings"])
    made = Layout.read(Path(values["sites"]).parent.parent)
    if path_of(made, values).resolve() != path.resolve():
        raise UserError(
            path, f"{values['config']} has changed since this run was begun", "bring it back, or start another run"
        )
    control.wait_ready(made)
    try:  # a ServerApp that was killed stays "running" in the SuperLink's list until it is stopped
        if not control.standing(made, begun["run_id"]).startswith("finished"):
            control.stop(made, begun["run_id"])
    except UserError as e:
        say(str(e))
    return made, *start(made, values, say)


def follow(made: Layout, path: Path, run: str, say: Say) -> dict[str, Any]:
    """Tell what happens until the run is over; final.json's content.

    Raises:
        UserError: it stopped; the line says why and how to go on.
    """
    seen, told, waiting, heard = 0, 0, "", time.monotonic()
    seen, told = len(read_rows(path / "rounds.jsonl")), len(_whole(path / "events.jsonl"))
    while not (path / "final.json").exists():
        rows, events = _whole(path / "rounds.jsonl"), _whole(path / "events.jsonl")
        for row in rows[seen:]:
            say(_round_line(row))
        for event in events[told:]:
            if event["event"] in (
                "site refused",
                "site admitted",
                "too few answers",
                "a client has lost its memory",
                "update rejected",
            ):
                say(
                    f"{event['event']}: "
                    + ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "node"))
                )
        status = read_json(path / "status.json") if (path / "status.json").exists() else {}
        if "stopped" in status:
            raise UserError(path, str(status["stopped"]), f"mllm-fl deploy resume {typed(path)}")
        news = len(rows) > seen or len(events) > told or time.time() - float(status.get("time", 0)) < 5
        seen, told = max(seen, len(rows)), len(events)
        late = ", ".join(status.get("waiting_for", []))
        if late != waiting and late and status.get("kind") != "train":
            say(f"waiting for {late}")
        waiting, heard = late, time.monotonic() if news else heard
        if time.monotonic() - heard > STALE:
            _ask(made, path, run)
            heard = time.monotonic()
        time.sleep(0.5)
    for row in _whole(path / "rounds.jsonl")[seen:]:
        say(_round_line(row))
    return read_json(path / "final.json")


def _ask(made: Layout, path: Path, run: str) -> None:
    try:
        standing = control.standing(made, run)
    except UserError as e:
        raise UserError(
            path, f"the SuperLink does not answer ({e})", f"start it, then mllm-fl deploy resume {typed(path)}"
        ) from e
    if standing.startswith("finished") and not (path / "final.json").exists():
        raise UserError(
            path, f"the run ended ({standing}) before it was finished", f"mllm-fl deploy resume {typed(path)}"
        )


def _whole(path: Path) -> list[dict[str, Any]]:
    """The rows that are written to their end by now."""
    try:
        return read_rows(path)
    except UserError:
        return []


def _round_line(row: dict[str, Any]) -> str:
    line = f"round {row['round']}: {len(row['clients']) - len(row.get('dropped', {}))} of {len(row['clients'])} clients"
    line += f", accuracy {row['accuracy']:.1%}" if row.get("accuracy") is not None else ""
    line += f", {row['rejected']} rejected" if row["rejected"] else ""
    return line + "".join(f"; client {k} dropped: {why}" for k, why in row.get("dropped", {}).items())


def overview(made: Layout) -> list[str]:
    """What ``mllm-fl deploy status`` shows: the SuperLink, each site, each run with its round and what it waits for."""
    lines = [f"federation {made.folder}, server {made.host}:{made.port}"]
    if control.ready(made):
        by_number = {str(n.get("node-id")): n for n in control.nodes(made)}
        for site in read_sites(made.sites_json):
            found = by_number.get(str(site.node), {})
            state = found.get("status", "not registered") if site.node is not None else "not registered"
            lines.append(f"  site {site.name}: {state}")
    else:
        lines.append(f"  no SuperLink answers; start it: mllm-fl deploy superlink {typed(made.folder)}")
    for place in sorted((made.folder / "runs").glob("*/*/deployment.json")):
        lines.append("  " + run_line(place.parent))
    return lines


def run_line(path: Path) -> str:
    """One run in one line."""
    rows = _whole(path / "rounds.jsonl")
    status = read_json(path / "status.json") if (path / "status.json").exists() else {}
    line = f"run {path.name}: {len(rows)} rounds done"
    if (path / "final.json").exists():
        return f"{line}, finished"
    if "stopped" in status:
        return f"{line}, stopped: {status['stopped']}"
    age = time.time() - float(status.get("time", 0))
    if status.get("waiting_for"):
        line += f"; {status.get('kind', 'start')} of round {status.get('round', 1)} waits for {', '.join(status['waiting_for'])}"
        line += f" since {status['seconds']:.0f} s" if "seconds" in status else ""
    line += "".join(f"; {site} refused: {why}" for site, why in (status.get("refused") or {}).items())
    return line + (f"; no news for {age:.0f} s: mllm-fl deploy resume {typed(path)}" if age > 120 else "")
