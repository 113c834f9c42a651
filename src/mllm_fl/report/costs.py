"""What the runs cost: bytes, seconds, operations, memory, energy, and the annotation bill; per client and for the server."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_fl.report.html import Cell, Markup, join, name, paragraph, section, table
from mllm_fl.report.reading import Arm, Found, Run
from mllm_fl.report.summary import scores
from mllm_fl.report.table import MISSING, Value, mean_sd

PARTS = ("annotate", "pretrain", "clients", "server", "align", "evaluate", "total")
COUNTED = ("pretrain", "clients", "server", "align", "evaluate")
BILL = ("questions", "answers", "failed", "prompt_tokens", "completion_tokens")
UNMEASURED = "not measured"
SIZES = ("B", "kB", "MB", "GB", "TB")
FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
JOULES = ("J", "kJ", "MJ")
MACHINE = {  # heading -> where it lies in "overhead", and its units
    "peak memory, server": (("peak_bytes", "process"), SIZES),
    "peak memory, workers": (("peak_bytes", "workers"), SIZES),
    "peak memory, GPU": (("peak_bytes", "gpu"), SIZES),
    "energy, processors": (("joules", "cpu"), JOULES),
    "energy, GPUs": (("joules", "gpu"), JOULES),
}


def costs(found: Found) -> Markup:
    """Bytes over the wire and seconds by stage; where runs recorded them, operations, memory, energy and the annotation bill."""
    head = [
        "arm",
        "up",
        "down",
        "up per client and round",
        *(f"{p}, s" for p in PARTS),
        "a client sends besides weights",
    ]
    body = []
    for arm in found.arms:
        row: list[object] = [name(arm.name), *(_bytes(mean_sd(scores(arm, k))) for k in ("bytes_up", "bytes_down"))]
        row.append(_bytes(mean_sd([_per_update(run) for run in arm.runs])))
        row += [_seconds(mean_sd(scores(arm, "seconds", part))) for part in PARTS]
        row.append(", ".join(sorted({str(r.final.get("uploads_beyond_weights") or MISSING) for r in arm.runs})))
        body.append(row)
    note = "Bytes are those of the tensors, per run. Seconds are wall-clock; annotation and pretraining may be shared by several runs."
    grid = table("Communication and time by arm, means over seeds", head, body)
    measured = [arm for arm in found.arms if all(isinstance(r.final.get("overhead"), dict) for r in arm.runs)]
    more = [_operations(measured), _each(measured), _annotation(measured)] if measured else []
    return section("costs", "Communication, time and energy", grid, paragraph(note, class_="note"), *more)


def _operations(arms: Sequence[Arm]) -> Markup:
    """Operations by stage."""
    body = []
    for arm in arms:
        parts = [scores(arm, "overhead", "flop", p) for p in COUNTED]
        body.append([name(arm.name), *(_of_stage(arm, p, values) for p, values in zip(COUNTED, parts, strict=True))])
    rules = dict.fromkeys(str(run.final["overhead"].get("flop_rule") or MISSING) for arm in arms for run in arm.runs)
    head = ["arm", "pretraining", "clients", "server’s method", "alignment", "evaluation"]
    grid = table("Operations of a whole run by arm, FLOP", head, body)
    return join([grid, paragraph("Counted: ", join(rules, "; "), ".", class_="note")])


def _of_stage(arm: Arm, part: str, values: Sequence[float | None]) -> Cell:
    """A count; a stage that is off has none, one that is on and uncounted was not measured."""
    stages = arm.first.final.get("stages")
    if part == "pretrain" and isinstance(stages, dict) and not stages.get("pretrain"):
        return Cell(MISSING)
    return _unit(mean_sd(values), FLOP)


def _each(arms: Sequence[Arm]) -> Markup:
    """One client's visit, and what the machine that played the server used; what no run measured is said below the table."""
    body: list[list[object]] = []
    measured = [
        heading
        for heading, (path, _) in MACHINE.items()
        if any(mean_sd(scores(arm, "overhead", *path)) is not None for arm in arms)
    ]
    for arm in arms:
        visit = {
            key: mean_sd(scores(arm, "overhead", "per_visit", key))
            for key in ("seconds", "flop", "bytes_up", "bytes_down")
        }
        row: list[object] = [name(arm.name), _seconds(visit["seconds"]), _unit(visit["flop"], FLOP)]
        row += [_bytes(visit["bytes_up"]), _bytes(visit["bytes_down"])]
        for heading in measured:
            path, units = MACHINE[heading]
            value = mean_sd(scores(arm, "overhead", *path))
            row.append(Cell(UNMEASURED) if value is None else _unit(value, units))
        body.append(row)
    head = ["arm", "a visit, s", "a visit, FLOP", "a visit, up", "a visit, down", *measured]
    note = (
        "A visit is one client’s part of one round, mean over all visits. Memory is resident, of the process that plays the server (and, in a "
        "simulation, clients). Energy is that of whole chips during the rounds, other programs included; annotation and pretraining are outside it."
    )
    missing = [heading for heading in MACHINE if heading not in measured]
    if missing:
        note += f" Not measured, because the machine does not tell or there is none: {', '.join(missing)}."
    return join([table("Each client’s visit, and the machine, by arm", head, body), paragraph(note, class_="note")])


def _annotation(arms: Sequence[Arm]) -> Markup:
    """The annotation bill of the arms that pretrain."""
    body = []
    for arm in arms:
        bills = [run.final["overhead"].get("annotation") for run in arm.runs]
        if not all(isinstance(b, dict) for b in bills):
            continue
        cells = [mean_sd(scores(arm, "overhead", "annotation", key)) for key in (*BILL, "seconds")]
        shown = [Cell(MISSING) if v is None else Cell(f"{v.mean:,.0f}", v.mean, v.sd) for v in cells[:-1]]
        body.append(
            [name(arm.name), name(", ".join(sorted({str(b.get("model")) for b in bills}))), *shown, _seconds(cells[-1])]
        )
    if not body:
        return Markup("")
    head = ["arm", "annotator", "questions", "answers", "failed", "tokens in", "tokens out", "answering, s"]
    return table("Annotation bill by arm (a corpus is shared by the runs that ask for the same one)", head, body)


def _per_update(run: Run) -> float | None:
    sizes = [row["bytes_up"] for row in run.clients if isinstance(row.get("bytes_up"), int)]
    return sum(sizes) / len(sizes) if sizes else None


def _bytes(value: Value | None) -> Cell:
    return _unit(value, SIZES)


def _unit(value: Value | None, units: Sequence[str]) -> Cell:
    """A quantity in the unit that leaves at most three digits; the exact value stays in the cell."""
    if value is None:
        return Cell(UNMEASURED if units[0] == "FLOP" else MISSING)
    size, left = value.mean, list(units)
    while size >= 1000 and len(left) > 1:
        size, left = size / 1000, left[1:]
    whole = size >= 100 or left[0] == units[0]
    return Cell(f"{size:.0f} {left[0]}" if whole else f"{size:.1f} {left[0]}", value.mean, value.sd)


def _seconds(value: Value | None) -> Cell:
    if value is None:
        return Cell(MISSING)
    digits = 0 if value.mean >= 100 else 3 if 0.0005 <= value.mean < 0.095 else 1
    return Cell(f"{value.mean:,.{digits}f}", value.mean, value.sd)
