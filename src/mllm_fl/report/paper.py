"""The paper's Tables 2, 3 and 4 with our numbers beside the published ones.

Published numbers lie in ``published/``, each with its source. Ours come from results files alone. A run stands in a published column's row only if it
was made by that column's protocol, as far as the paper and the code it names tell it (PROTOCOL below); whatever was made otherwise has a
table of its own that says so, and those of the reduced protocol R are called that. What nobody has run is "–".
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from mllm_fl.data.longtail import class_counts
from mllm_fl.errors import UserError
from mllm_fl.report.table import MISSING, alignment_notes, compare, group, number, percent
from mllm_fl.toml import flatten

METHODS = {  # federate.algorithm -> the paper's name
    "fedavg": "FedAvg", "fedavgm": "FedAvgM", "fedprox": "FedProx", "feddf": "FedDF", "fedbe": "FedBE", "ccvr": "CCVR", "fednova": "FedNova",
    "fedfocal": "Fed-Focal Loss", "ratioloss": "Ratio Loss", "taunorm": "FedAvg+tau-norm", "creff": "CReFF", "clip2fl": "CLIP2FL",
}  # fmt: skip
OURS = "MLLM-LLaVA-FL"
RULES = {"last": "last round", "mean_last": "mean of the last rounds", "max": "max, selected on test"}
COMMON = {"data.clients": 20, "federate.clients_per_round": 8, "federate.rounds": 200, "federate.local.batch_size": 32}
CIFAR = COMMON | {
    "data.partition": "creff", "data.alpha": 0.5, "federate.local.epochs": 10, "federate.local.lr": 0.1,
    "model.name": "resnet8", "model.width": 64,
}  # fmt: skip
IMAGENET = COMMON | {"data.alpha": 0.1, "model.name": "resnet50"}
PROTOCOL = {2: CIFAR, 3: IMAGENET}
REDUCED = {"federate.rounds": 40, "federate.local.epochs": 3, "model.width": 16}
REDUCED_EXPERIMENTS = ("methods_r",)
TITLES = {
    2: "Table 2: accuracy on CIFAR-10-LT and CIFAR-100-LT, %",
    3: "Table 3: accuracy on ImageNet-LT, %",
    4: "Table 4: centralised training on small subsets, with and without pretraining",
}


@dataclass(frozen=True)
class Sheet:
    """One table as text: ``rows`` have as many cells as ``head``; ``notes`` stand below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())


def published(table: int) -> tuple[list[str], list[dict[str, str]]]:
    """The source lines of a published table, and its rows by column."""
    text = (files("mllm_fl.report") / "published" / f"table{table}.csv").read_text(encoding="utf-8")
    lines = text.splitlines()
    source = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return source, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def sheets(table: int, finals: Sequence[Mapping[str, Any]], rule: str = "mean_last") -> list[Sheet]:
    """The paper's table with ours beside it, then a table for each other protocol under which its data sets were run.

    Args:
        table: 2, 3 or 4.
        finals: lines of results files.
        rule: "last", "mean_last" or "max"; Table 3's groups are always of the last round, Table 4 has its own columns.

    Raises:
        UserError: another table or rule.
    """
    if table not in TITLES:
        raise UserError("table", f"the paper has no Table {table} of results", "choose 2, 3 or 4")
    if rule not in RULES:
        raise UserError("--rule", f"{rule!r} is unknown", f"choose {', '.join(RULES)}")
    if table == 4:
        return [_subsets(finals)]
    chosen = "last" if table == 3 else rule
    by_protocol: dict[str, list[Mapping[str, Any]]] = {}
    for final in finals:
        if _columns(table, final):
            by_protocol.setdefault(_protocol(table, final), []).append(final)
    out = [_beside(table, by_protocol.pop("", []), chosen)]
    return out + [_apart(table, name, found, chosen) for name, found in sorted(by_protocol.items())]


def setting(final: Mapping[str, Any]) -> str | None:
    """ "CIFAR-10-LT 100", "CIFAR-100-LT 10", "ImageNet-LT", by the counts of the classes; None for other data."""
    counts = final.get("class_counts")
    if not isinstance(counts, list) or not counts:
        return None
    source = str(_config(final).get("data.source", ""))
    if len(counts) == 1000 and (sum(counts), max(counts), min(counts)) == (115846, 1280, 5):
        return "ImageNet-LT"
    for classes, name in ((10, "cifar10"), (100, "cifar100")):
        for imbalance in (100, 50, 10):
            if (
                len(counts) == classes
                and source in ("", name)
                and counts == class_counts(50000 // classes, classes, imbalance)
            ):
                return f"CIFAR-{classes}-LT {imbalance}"
    return None


def departures(table: int, final: Mapping[str, Any]) -> list[str] | None:
    """How a run differs from the paper's protocol, as "federate.rounds 40, not 200"; None if it did not record its configuration."""
    config = _config(final)
    if not config:
        return None
    return [f"{k} {config.get(k, MISSING)}, not {v}" for k, v in PROTOCOL[table].items() if config.get(k) != v]


def _protocol(table: int, final: Mapping[str, Any]) -> str:
    """ "" for the paper's, else the name under which the run stands apart."""
    config = _config(final)
    if final.get("experiment") in REDUCED_EXPERIMENTS or (
        config and all(config.get(k) == v for k, v in REDUCED.items())
    ):
        return "reduced protocol R"
    found = departures(table, final)
    if found is None:
        return f"experiment {final.get('experiment')}, whose configuration was not recorded"
    return f"another protocol ({'; '.join(found)})" if found else ""


def _config(final: Mapping[str, Any]) -> dict[str, Any]:
    config = final.get("config")
    return flatten(config) if isinstance(config, dict) else {}


def _columns(table: int, final: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Heading of each published column that this run has a number for -> where it lies in its record (() for the rule's own)."""
    name = setting(final)
    if table == 2:
        return {name: ()} if name and name.startswith("CIFAR") else {}
    groups = {"All": "accuracy", "Many": "many", "Medium": "medium", "Few": "few"}
    return {k: ("last", v) for k, v in groups.items()} if name == "ImageNet-LT" else {}


def _label(finals: Sequence[Mapping[str, Any]]) -> str | None:
    """The paper's name of what an arm did: a method without stages 1 and 3, or the whole of ours; None for anything between."""
    stages = finals[0].get("stages")
    on = [bool(stages.get(k)) for k in ("pretrain", "align")] if isinstance(stages, Mapping) else [False, False]
    if all(on):
        return OURS if finals[0].get("algorithm") == "fedavg" else None
    return None if any(on) else METHODS.get(str(finals[0].get("algorithm")))


def _cells(table: int, finals: Sequence[Mapping[str, Any]], rule: str) -> dict[str, dict[str, str]]:
    """Row label -> column -> "mean ± sd" of ours; arms that the paper does not name keep their own."""
    by_column: dict[str, list[Mapping[str, Any]]] = {}
    for final in finals:
        for column in _columns(table, final):
            by_column.setdefault(column, []).append(final)
    out: dict[str, dict[str, str]] = {}
    for column, found in by_column.items():
        arms = group(found)
        labels = {arm: _label(runs) for arm, runs in arms.items()}
        for arm, runs in arms.items():
            label = labels[arm]
            row = arm if label is None or list(labels.values()).count(label) > 1 else label
            (value,) = compare(runs)
            path = _columns(table, runs[0])[column]
            chosen = value.values[rule if not path else path[1].replace("accuracy", "last")]
            once = chosen is None and rule == "mean_last" and all("from" in run for run in runs)
            chosen = value.values["last"] if once else chosen
            shown = percent(chosen, sd=len(runs) > 1)  # of one seed the deviation would be over its rounds
            shown += _ONCE_MARK if once and chosen is not None else ""
            out.setdefault(row, {})[column] = shown + (f" ({len(runs)})" if shown != MISSING else "")
    return out


def _beside(table: int, finals: Sequence[Mapping[str, Any]], rule: str) -> Sheet:
    source, rows = published(table)
    columns = [c for c in rows[0] if c != "method"]
    ours = _cells(table, finals, rule)
    head = ("method", *(f"{c}, {whose}" for c in columns for whose in ("published", "ours")))
    body = []
    for row in rows:
        mine = ours.pop(row["method"], {})
        body.append((row["method"], *(x for c in columns for x in (row[c], mine.get(c, MISSING)))))
    for name, mine in ours.items():
        body.append((name, *(x for c in columns for x in (MISSING, mine.get(c, MISSING)))))
    notes = [*source, f"Ours: {_words(rule, finals)}, mean ± sample standard deviation over seeds (how many).", _RULE]
    if any(_ONCE_MARK in cell for line in body for cell in line):
        notes.append(_ONCE)
    if not finals:
        notes.append("No run by the paper's protocol is among the results.")
    notes += alignment_notes(compare(finals))
    return Sheet(TITLES[table], head, tuple(body), tuple(notes))


_ONCE_MARK = " †"
_ONCE = "† applied once to a finished FedAvg run: there are no rounds to take a mean over; its one score."
_RULE = (
    "Published: the paper does not say by which rule; code of the same line reports the best round on the test images."
)


def _words(rule: str, finals: Sequence[Mapping[str, Any]]) -> str:
    """The rule in words, with the number of rounds where all runs agree on it."""
    windows = {number(f, "mean_last", "rounds") for f in finals if f.get("mean_last")}
    if rule == "mean_last" and len(windows) == 1 and None not in windows:
        return f"mean over the evaluated rounds among the last {windows.pop():g}"
    return RULES[rule]


def _apart(table: int, protocol: str, finals: Sequence[Mapping[str, Any]], rule: str) -> Sheet:
    """Runs of another protocol among themselves."""
    ours = _cells(table, finals, rule)
    columns = list(dict.fromkeys(c for final in finals for c in _columns(table, final)))
    ranked = [*METHODS.values(), OURS]
    names = sorted(ours, key=lambda n: (ranked.index(n) if n in ranked else len(ranked), n))
    body = tuple((name, *(ours[name].get(c, MISSING) for c in columns)) for name in names)
    once = (_ONCE,) if any(_ONCE_MARK in cell for line in body for cell in line) else ()
    notes = (
        f"{protocol[0].upper()}{protocol[1:]}: methods among themselves; not comparable with the paper's numbers.",
        f"{_words(rule, finals)}, mean ± sample standard deviation over seeds (how many).",
        *once,
        *alignment_notes(compare(finals)),
    )
    return Sheet(f"{TITLES[table].partition(':')[0]}'s data, {protocol}", ("method", *columns), body, notes)


def _subsets(finals: Sequence[Mapping[str, Any]]) -> Sheet:
    """Table 4: one client that holds the subset, an epoch a round, 30 rounds."""
    source, rows = published(4)
    body = []
    for row in rows:
        runs = [f for f in finals if _is_subset(f, row)]
        epochs = [_reached(f, float(row["target"]) / 100) for f in runs]
        best = compare(runs)[0].values["max"] if runs and len(group(runs)) == 1 else None
        known = [e for e in epochs if e is not None]
        ours = f"{sum(known) / len(known):.1f} ({len(known)})" if known and len(known) == len(runs) else MISSING
        body.append((
            row["initialisation"], row["data set"], row["images"], row["target"],
            row["epochs to target"], ours, row["best in 30"], percent(best) + (f" ({len(runs)})" if best else ""),
        ))  # fmt: skip
    head = (
        "initialisation", "data set", "images", "target, %",
        "epochs to target, published", "epochs to target, ours", "best in 30, published", "best in 30, ours",
    )  # fmt: skip
    rule = "Ours: runs with one client, an epoch a round and 30 rounds on that many images; the best epoch is selected on test, as in the paper."
    return Sheet(TITLES[4], head, tuple(body), (*source, rule))


def _is_subset(final: Mapping[str, Any], row: Mapping[str, str]) -> bool:
    config, counts = _config(final), final.get("class_counts")
    stages = final.get("stages") or {}
    return (
        config.get("data.source") == row["data set"].lower().replace("-", "")
        and isinstance(counts, list) and sum(counts) == int(row["images"])
        and (config.get("data.clients"), config.get("federate.rounds"), config.get("federate.local.epochs")) == (1, 30, 1)
        and bool(stages.get("pretrain")) == (row["initialisation"] == "with pretraining") and not stages.get("align")
    )  # fmt: skip


def _reached(final: Mapping[str, Any], target: float) -> int | None:
    """The first evaluated round at or above the target."""
    history = final.get("history")
    if not isinstance(history, Mapping):
        return None
    pairs = zip(history.get("round", ()), history.get("accuracy", ()), strict=False)
    return next((int(t) for t, a in pairs if number({"a": a}, "a") is not None and a >= target), None)
