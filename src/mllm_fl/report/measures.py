"""What one accuracy does not say: classes that weigh the same, calibration, what each client has of the model, what was forgotten."""

from __future__ import annotations

from mllm_fl.report.html import Cell, Markup, details, join, name, paragraph, percent_cell, section, table
from mllm_fl.report.reading import Arm, Found
from mllm_fl.report.summary import scores
from mllm_fl.report.table import Value, mean_sd, number

COLUMNS = {  # heading -> path in final.json, all of the shipped model
    "class-weighted, %": ("last", "class_weighted"),
    "clients, mean, %": ("per_client", "mean"),
    "clients, worst decile, %": ("per_client", "worst_decile"),
    "calibration error (ECE), points": ("last", "ece"),
    "forgotten, points": ("forgetting", "mean"),
}
NOTES = (
    "Class-weighted: mean over the classes. Clients: what the shipped model is worth to each client if its test images are distributed like its "
    "training images (class accuracies weighted by the client’s histogram); worst decile: mean over the worst tenth of the clients.",
    "ECE: mean gap between confidence and accuracy over 15 equally wide bins of confidence. Forgotten: how far each class is below the best that "
    "it was in any evaluated round, mean over the classes.",
)
CLIENTS = 400  # rows of the table client by client


def measures(found: Found) -> Markup:
    """The table, and client by client below it; empty where no run recorded any of it."""
    body = []
    for arm in found.arms:
        values = [mean_sd(scores(arm, *path)) for path in COLUMNS.values()]
        if any(v is not None for v in values):
            body.append([name(arm.name), *map(percent_cell, values)])
    chosen = _chosen(found)
    if not body:
        return Markup("")
    grid = table("Other measures of the shipped model, by arm", ["arm", *COLUMNS], body)
    notes = [paragraph(n, class_="note") for n in NOTES]
    return section("measures", "Beyond one accuracy", grid, *notes, chosen, _client_by_client(found))


def _chosen(found: Found) -> Markup:
    """The round that held-out validation images chose, and what it scores on test images."""
    body = []
    for arm in found.arms:
        test, held = (mean_sd(scores(arm, "chosen", key)) for key in ("accuracy", "validation"))
        if test is None:
            continue
        rounds = ", ".join(str(r.final["chosen"].get("round", "–")) for r in arm.runs)
        images = {str(r.final["chosen"].get("source", "–")) for r in arm.runs}
        body.append([name(arm.name), percent_cell(test), percent_cell(held), rounds, join(sorted(images), "; ")])
    if not body:
        return Markup("")
    head = ["arm", "test, %", "validation, %", "round", "validation images"]
    return table("The round chosen on held-out validation images", head, body)


def _client_by_client(found: Found) -> Markup:
    arms = [arm for arm in found.arms if _each(arm)]
    if not arms:
        return Markup("")
    longest = max(len(values) for arm in arms for values in _each(arm))
    if longest > CLIENTS:
        return paragraph(f"The values of {longest:,} clients are in the runs’ final.json.", class_="note")
    body = []
    for k in range(longest):
        cells: list[object] = []
        for arm in arms:
            held = [number({"x": v[k]}, "x") if k < len(v) else None for v in _each(arm)]
            value: Value | None = mean_sd(held)
            cells.append(percent_cell(value))
        body.append([Cell(f"client {k}", k).shown, *cells])
    grid = table("Accuracy by client, %", ["client", *(name(arm.name) for arm in arms)], body)
    return details("Accuracy client by client", grid)


def _each(arm: Arm) -> list[list[object]]:
    """The clients' accuracies, a list a run; empty unless every run of the arm has them."""
    out = []
    for run in arm.runs:
        record = run.final.get("per_client")
        values = record.get("each") if isinstance(record, dict) else None
        if not isinstance(values, list):
            return []
        out.append(values)
    return out
