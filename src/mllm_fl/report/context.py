"""The sections about how the results came to be: who holds what, configurations, environments, commands, what is unfinished."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_fl.report import plots
from mllm_fl.report.html import (
    Cell,
    Markup,
    details,
    figure,
    join,
    listing,
    name,
    paragraph,
    percent_cell,
    section,
    table,
    tag,
)
from mllm_fl.report.reading import Arm, Found, Run
from mllm_fl.report.table import MISSING, Value

FEDERATIONS = 6  # that are drawn
TABLED = 1000  # cells of a who-holds-what table that is also written as text


def holdings(found: Found) -> Markup:
    """Clients by classes, once for every federation among the runs."""
    seen: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for arm in found.arms:
        for run in arm.runs:
            if run.federation.get("clients"):
                key = json.dumps(run.federation, sort_keys=True)
                seen.setdefault(key, (run.federation, []))[1].append(arm.name)
    parts = [
        _federation(i, f, list(dict.fromkeys(arms)) if len(seen) > 1 else [], found.class_names)
        for i, (f, arms) in enumerate(list(seen.values())[:FEDERATIONS])
    ]
    if len(seen) > FEDERATIONS:
        rest = paragraph(f"{len(seen) - FEDERATIONS} more federations among the runs are not shown.", class_="note")
        parts.append(rest)
    unknown = paragraph("– Not known: the runs hold no federation.json, and their data is not on this machine.")
    return section("holdings", "Who holds what", *(parts or [unknown]))


def _federation(index: int, federation: Mapping[str, Any], arms: list[str], classes: tuple[str, ...]) -> Markup:
    counts = [list(c["histogram"]) for c in federation["clients"]]
    sizes = [sum(row) for row in counts]
    facts = f"{sum(sizes):,} images of {federation.get('dataset', MISSING)} on {len(sizes)} clients, {min(sizes):,} to {max(sizes):,} each"
    how = ", ".join(
        f"{word} {federation[key]}"
        for key, word in (("partition", "partition"), ("alpha", "alpha"), ("seed", "data seed"), ("imbalance_factor", "imbalance asked for"))
        if federation.get(key) is not None
    )  # fmt: skip
    held = [sum(n > 0 for n in row) for row in counts]
    label = f"Images of each class at each client: {facts}. A client holds {min(held)} to {max(held)} of {len(classes)} classes."
    svg = plots.matrix(
        f"h{index}", counts, [str(k) for k in range(len(counts))], classes, label,
        row_title="client", column_title="class", share=False,
    )  # fmt: skip
    whose = join([" Arms: ", join(map(name, arms), ", "), "."]) if arms else ""
    written: object = ""
    if len(counts) * len(classes) <= TABLED:
        body = [[f"client {k}", *(Cell(f"{n:,}", n) for n in (*row, sum(row)))] for k, row in enumerate(counts)]
        grid = table("Images of each class at each client", ["client", *map(name, classes), "all"], body)
        written = details("The same in numbers", grid)
    return join(
        [
            paragraph(facts, f" ({how})." if how else ".", whose),
            figure(svg, "The stronger the colour, the more images (logarithmic)."),
            written,
        ]
    )


def differences(found: Found) -> Markup:
    """Every configured value that is not the same in all arms."""
    heading = "What differs between the arms"
    configs = [_config(arm) for arm in found.arms]
    unequal = [[tag("code", k), *values] for k, values in _unequal(configs)]
    if not any(configs):
        return section("differences", heading, paragraph("The runs hold no config.toml."))
    if not unequal:
        return section("differences", heading, paragraph("Nothing but names and seeds."))
    total = len(set().union(*configs))
    note = f"All other of the {total} resolved values are equal. A table in brackets is a stage or part that some arms leave out (–)."
    grid = table("Configured values that differ", ["key", *(name(a.name) for a in found.arms)], unequal)
    return section("differences", heading, grid, paragraph(note, class_="note"))


def _unequal(configs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """(dotted key, value per arm); of a table that some arms lack, only the keys in which the others differ."""
    keys = sorted(set().union(*configs) - {"name", "seed"})
    out: list[tuple[str, list[str]]] = []
    for table_name in dict.fromkeys(k.partition(".")[0] for k in keys if "." in k):
        has = [any(k.startswith(f"{table_name}.") for k in c) for c in configs]
        if not all(has):
            out.append((f"[{table_name}]", ["on" if h else MISSING for h in has]))
    absent = [{name.strip("[]") for name, values in out if values[i] == MISSING} for i in range(len(configs))]
    for key in keys:
        values = [c.get(key, MISSING) for c in configs]
        known = {v for v, without in zip(values, absent, strict=True) if key.partition(".")[0] not in without}
        if len(known) > 1:
            out.append((key, values))
    return sorted(out, key=lambda row: row[0].strip("[]"))


def _config(arm: Arm) -> dict[str, str]:
    """An arm's values as text; where its seeds disagree, all of them."""
    keys = sorted({k for run in arm.runs for k in run.config})
    return {k: " | ".join(dict.fromkeys(_value(run.config.get(k)) for run in arm.runs)) for k in keys}


def _value(value: Any) -> str:
    return MISSING if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def reproduce(found: Found) -> Markup:
    """Per run: seed, commit, hashes and commands; and the environments."""
    body = []
    for run in found.runs:
        f = run.final
        named = (f.get(key) or MISSING for key in ("config_hash", "manifest_sha256", "weights_sha256"))
        hashes = [tag("code", str(x)[:12]) for x in named]
        body.append([run.label, tag("code", _commit(run)), *hashes, tag("code", _again(run))])
    head = ["run", "commit", "configuration", "partition", "weights", "to reproduce"]
    grid = table("Runs, their hashes and commands", head, body)
    heading = "Environment, and how to reproduce"
    return section("reproduce", heading, grid, _commits(found), _commands(found), _environments(found))


def _commits(found: Found) -> Markup:
    """What a reader of the commits must not overlook."""
    commits = {_commit(run) for run in found.runs}
    said = []
    if len(commits) > 1:
        said.append(f"The runs come from {len(commits)} different states of the code.")
    if any(c.endswith("-dirty") for c in commits):
        said.append("“dirty”: the code had changes that were not committed.")
    return paragraph(" ".join(said), class_="note") if said else Markup("")


def _commit(run: Run) -> str:
    recorded = run.final.get("environment")
    commit = recorded.get("commit") if isinstance(recorded, Mapping) else None
    return str(commit or run.environment.get("commit") or MISSING)


def _again(run: Run) -> str:
    return f"mllm-fl run {shlex.quote(str(run.folder / 'config.toml'))} --runs NEW"


def _commands(found: Found) -> Markup:
    said = dict.fromkeys(str(run.final.get("command") or "") for run in found.runs)
    listed = listing(tag("code", c) for c in said if c)
    return details("As they were started", listed) if any(said) else Markup("")


def _environments(found: Found) -> Markup:
    kinds: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for run in found.runs:
        facts = {k: v for k, v in run.environment.items() if k not in ("command", "commit")}
        kinds.setdefault(json.dumps(facts, sort_keys=True, default=str), (facts, []))[1].append(run.label)
    parts = []
    for recorded, labels in kinds.values():
        if not recorded:
            continue
        caption = "Environment of all runs" if len(kinds) == 1 else f"Environment of {', '.join(labels)}"
        rows = [[key, _value(value)] for key, value in recorded.items()]
        parts.append(table(caption, ["what", "value"], rows, sortable=False))
    return join(parts)


def unfinished(found: Found) -> Markup:
    """Runs that have begun but not ended."""
    if not found.unfinished:
        return Markup("")
    body = [
        [name(u.name), f"{u.done} of {u.rounds if u.rounds is not None else MISSING} rounds",
         percent_cell(None if u.accuracy is None else Value(u.accuracy)), tag("code", u.folder)]
        for u in found.unfinished
    ]  # fmt: skip
    grid = table("Unfinished runs, in no number above", ["run", "done", "latest accuracy, %", "folder"], body)
    return section(
        "unfinished", "Unfinished", grid, paragraph("The command that began a run resumes it.", class_="note")
    )
