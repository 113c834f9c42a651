"""Fill docs/reduced-protocol.md and docs/fidelity.md from results/methods_r.jsonl and results/methods_r_curves.jsonl; ``--check`` exits 1 when stale.

    python scripts/methods_r.py [--runs runs/methods_r]

``--runs``: first take the curves (accuracy by evaluated round) of the finished runs in this folder into results/methods_r_curves.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from mllm_fl.algorithms import METHODS, find
from mllm_fl.atomic import write_atomic
from mllm_fl.conformance.table import heading
from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill
from mllm_fl.results import read
from mllm_fl.runs import read_json, read_rows

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "scripts" / "published_cifar10_if100.csv"
RESULTS = ROOT / "results" / "methods_r.jsonl"
CURVES = ROOT / "results" / "methods_r_curves.jsonl"
LAST = 10  # evaluated rounds that the headline is the mean of
BASE = "fedavg"
SAID = r"What we chang|We change nothing|Doubts|What we add|Ours:"
Run = dict[str, Any]
Curve = dict[int, float]


def percent(values: list[float | None], signed: bool = False) -> str:
    """Mean over runs in per cent, with the sample deviation where there are several; an en dash where nothing was measured."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):{'+' if signed else ''}.1f}"
    return mean + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def arms(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by arm, best headline first, post-hoc arms last."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: (once(item[1]), -statistics.mean(map(headline, item[1])))))


def once(runs: list[Run]) -> bool:
    """Whether an arm was applied once, to a finished run."""
    return not runs[0]["mean_last"]


def headline(run: Run) -> float:
    """The mean of the last ten rounds; of a method applied once its gain over the model it was applied to."""
    return float(run["mean_last"]["mean"] if run["mean_last"] else run["last"]["accuracy"] - run["from"]["accuracy"])


def taken(folder: Path) -> list[dict[str, Any]]:
    """The curves of the finished runs in a folder: a line for each run that has rounds of its own."""
    lines = []
    for final in sorted(folder.glob("*/final.json")):
        run, rows = read_json(final), read_rows(final.with_name("rounds.jsonl"))
        if run["mean_last"]:
            known = [(r["round"], r["accuracy"]) for r in rows if r["accuracy"] is not None]
            lines.append(
                {"arm": run["arm"], "seed": run["seed"], "config_hash": run["config_hash"],
                 "round": [t for t, _ in known], "accuracy": [a for _, a in known]}
            )  # fmt: skip
    if not lines:
        raise UserError(folder, "holds no finished run with rounds of its own")
    return lines


def curves(path: Path) -> dict[tuple[str, str, int], Curve]:
    """Accuracy by evaluated round, by (arm, configuration, seed)."""
    return {
        (r["arm"], r["config_hash"], r["seed"]): dict(zip(r["round"], r["accuracy"], strict=True))
        for r in read_rows(path)
    }


def beside(arm: str) -> str:
    """The arm that an arm is compared with round by round: FedAvg on the same partition."""
    return BASE + "-dirichlet" * arm.endswith("-dirichlet")


def paired(runs: list[Run], by_arm: dict[str, list[Run]], known: dict[tuple[str, str, int], Curve]) -> list[float]:
    """Differences to FedAvg's run of the same seed in each of the last ten rounds, all seeds in a row; [] where a curve is missing, and of FedAvg."""
    base_arm = beside(runs[0]["arm"])
    if runs[0]["arm"] == base_arm:
        return []
    bases = {r["seed"]: known.get((base_arm, r["config_hash"], r["seed"])) for r in by_arm.get(base_arm, [])}
    out: list[float] = []
    for r in runs:
        mine, base = known.get((r["arm"], r["config_hash"], r["seed"])), bases.get(r["seed"])
        if mine and base and mine.keys() == base.keys():
            out += [mine[t] - base[t] for t in sorted(mine)[-LAST:]]
    return out


def table(by_arm: dict[str, list[Run]], known: dict[tuple[str, str, int], Curve]) -> str:
    """The comparison as Markdown: methods with rounds of their own, then those that were applied once to FedAvg's last model."""
    rows = [
        "| arm | seeds | mean of last 10 | within-run sd | minus FedAvg, paired | last | max* | many | medium | few | client s | server s | MB up | MB down |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in by_arm.items():
        if once(runs):
            continue
        gaps = paired(runs, by_arm, known)
        cells = [
            arm, str(len(runs)), percent([headline(r) for r in runs]),
            f"{100 * statistics.mean(r['mean_last']['sd'] or 0 for r in runs):.1f}", percent(list(gaps), signed=True),
            percent([r["last"]["accuracy"] for r in runs]), percent([r["max"]["accuracy"] for r in runs]), *shared(runs),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    rows += [
        "",
        "Post-hoc, applied once to the last model of FedAvg's run: compare with that model, not with the means above.",
        "",
        "| arm | seeds | FedAvg's last model | with the method | gain | many | medium | few | client s | server s | MB up | MB down |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in by_arm.items():
        if once(runs):
            cells = [
                arm, str(len(runs)), percent([r["from"]["accuracy"] for r in runs]), percent([r["last"]["accuracy"] for r in runs]),
                percent([headline(r) for r in runs], signed=True), *shared(runs),
            ]  # fmt: skip
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def shared(runs: list[Run]) -> list[str]:
    """The cells that both tables have: groups of the last model, seconds, bytes."""
    return [
        *(percent([r["last"][g] for r in runs]) for g in ("many", "medium", "few")),
        *(f"{statistics.mean(r['seconds'][k] for r in runs):.0f}" for k in ("clients", "server")),
        *(f"{statistics.mean(r[k] for r in runs) / 1e6:.0f}" for k in ("bytes_up", "bytes_down")),
    ]


def deviations(algorithm: str) -> list[str]:
    """What the method's file says that it changes, and its doubts: a paragraph each."""
    paragraphs = (sys.modules[find(algorithm).__module__].__doc__ or "").rstrip().split("\n\n")
    said = [p for p in paragraphs if re.search(SAID, p)]
    return [" ".join(p.split()).replace("``", "`") for p in said or paragraphs[-1:]]


def cards(by_arm: dict[str, list[Run]], known: dict[tuple[str, str, int], Curve]) -> str:
    """One fidelity card a method: the published value, ours, the rule, what differs."""
    with PUBLISHED.open(encoding="utf-8", newline="") as f:
        published = {row["arm"]: row for row in csv.DictReader(f)}
    out = []
    for name in METHODS:
        paper = published.get(name)
        value = f"{paper['accuracy_pct']} % ({paper['source']})" if paper else "none at this setting."
        lines = [f"## {heading(find(name))[0]} (`{name}`)", "", f"- **Published**, the paper's protocol: {value}"]
        mine = {arm: runs for arm, runs in by_arm.items() if runs[0]["algorithm"] == name}
        if not mine:
            lines.append("- **Ours**: not run yet under protocol R.")
        for arm, runs in mine.items():
            lines.append(f"- **Ours**, reduced protocol R, arm `{arm}`: {ours(runs, by_arm, known)}")
        where = sorted(
            {
                f"`{r['arm']}`: commit {r['environment']['commit']}, configuration {r['config_hash']}, seed {r['seed']}"
                for runs in mine.values()
                for r in runs
            }
        )
        lines += [f"- **Run**: {'; '.join(where)}."] if where else []
        lines += ["- **Deviations**, as its file states them:", *(f"  - {p}" for p in deviations(name)), ""]
        out.append("\n".join(lines))
    return "\n".join(out).rstrip()


def ours(runs: list[Run], by_arm: dict[str, list[Run]], known: dict[tuple[str, str, int], Curve]) -> str:
    """The number with its spread and rule, and how it stands to FedAvg."""
    seeds = f"{len(runs)} seed" + ("s" if len(runs) > 1 else "")
    if once(runs):
        start = percent([r["from"]["accuracy"] for r in runs])
        return f"{percent([r['last']['accuracy'] for r in runs])} %, applied once to FedAvg's last model ({start} %), {seeds}."
    spread = "over seeds" if len(runs) > 1 else f"; sd over these rounds {100 * (runs[0]['mean_last']['sd'] or 0):.1f}"
    text = f"{percent([headline(r) for r in runs])} %{' ' + spread if len(runs) > 1 else spread}; rule: mean of the last ten rounds, {seeds}."
    gaps = paired(runs, by_arm, known)
    return text + (f" Minus FedAvg, round by round: {percent(list(gaps), signed=True)}." if gaps else "")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    p = argparse.ArgumentParser(description="Fill docs/reduced-protocol.md and docs/fidelity.md.")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    p.add_argument("--runs", type=Path, help="take the curves of the finished runs in this folder first")
    p.add_argument("--docs", type=Path, default=ROOT / "docs")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--curves", type=Path, default=CURVES)
    args = p.parse_args(argv)
    try:
        if args.runs is not None and not args.check:
            lines = {(r["arm"], r["config_hash"], r["seed"]): r for r in [*read_rows(args.curves), *taken(args.runs)]}
            write_atomic(args.curves, "".join(json.dumps(lines[k]) + "\n" for k in sorted(lines)).encode())
        by_arm, known = arms(read(args.results)), curves(args.curves)
        stale = 0
        for name, mark, content in (
            ("reduced-protocol.md", "methods-r-table", table(by_arm, known)),
            ("fidelity.md", "fidelity-cards", cards(by_arm, known)),
        ):
            if fill(args.docs / name, {mark: content}, args.check) and args.check:
                print(f"methods_r: docs/{name} is stale; run `python scripts/methods_r.py`", file=sys.stderr)
                stale = 1
    except (UserError, OSError) as e:
        print(f"methods_r: {e}", file=sys.stderr)
        return 2
    return stale


if __name__ == "__main__":
    sys.exit(main())
