"""Fill docs/reduced-protocol.md from results/methods_r.jsonl: one table over all methods, and a fidelity card each; ``--check`` exits 1 when stale.

python scripts/methods_r.py
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from mllm_fl.algorithms import find
from mllm_fl.engines.checkpoint import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.results import read

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "scripts" / "published_cifar10_if100.csv"
Run = dict[str, Any]


def percent(values: list[float | None]) -> str:
    """Mean over runs in per cent, with the sample deviation where there are several; an en dash where nothing was measured."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def arms(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by arm, best headline first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], []).append(run)
    return dict(sorted(found.items(), key=lambda item: -statistics.mean(headline(r) for r in item[1])))


def headline(run: Run) -> float:
    """The mean of the last ten rounds; of a method applied once, to FedAvg's last model, that one accuracy."""
    return float(run["mean_last"]["mean"]) if run["mean_last"] else float(run["last"]["accuracy"])


def table(by_arm: dict[str, list[Run]]) -> str:
    """The comparison as Markdown."""
    rows = [
        "| arm | seeds | mean of last 10 | within-run sd | last | max* | many | medium | few | client s | server s | MB up | MB down |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in by_arm.items():
        once = not runs[0]["mean_last"]
        cells = [
            f"{arm}†" if once else arm, str(len(runs)), "–" if once else percent([headline(r) for r in runs]),
            "–" if once else f"{100 * statistics.mean(r['mean_last']['sd'] or 0 for r in runs):.1f}",
            percent([r["last"]["accuracy"] for r in runs]), "–" if once else percent([r["max"]["accuracy"] for r in runs]),
            *(percent([r["last"][g] for r in runs]) for g in ("many", "medium", "few")),
            *(f"{statistics.mean(r['seconds'][k] for r in runs):.0f}" for k in ("clients", "server")),
            *(f"{statistics.mean(r[k] for r in runs) / 1e6:.0f}" for k in ("bytes_up", "bytes_down")),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def deviations(algorithm: str) -> str:
    """What the method's file says that it changes, and its doubts."""
    paragraphs = (sys.modules[find(algorithm).__module__].__doc__ or "").rstrip().split("\n\n")
    said = [p for p in paragraphs if re.search(r"What we chang|We change nothing|Doubts|What we add|Ours:", p)]
    return " ".join(" ".join(p.split()) for p in said or paragraphs[-1:])


def cards(by_arm: dict[str, list[Run]]) -> str:
    """One fidelity card an arm: the published value, ours, the rule, what differs."""
    with PUBLISHED.open(encoding="utf-8", newline="") as f:
        published = {row["arm"]: row for row in csv.DictReader(f)}
    out = []
    for arm, runs in by_arm.items():
        paper = published.get(arm)
        value = f"{paper['accuracy_pct']} ({paper['source']})" if paper else "none at this setting"
        once = not runs[0]["mean_last"]
        ours = percent([headline(r) for r in runs]) + (
            ", one accuracy, after the last round" if once else f", mean of the last ten rounds, {len(runs)} seed(s)"
        )
        where = sorted({f"{r['environment']['commit']}, {r['config_hash']}, seed {r['seed']}" for r in runs})
        out.append(
            f"**{arm}** (`{runs[0]['algorithm']}`). Published, paper's protocol: {value}. Ours, reduced protocol R: {ours}. "
            f"Commit, configuration, seed: {'; '.join(where)}. Deviations: {deviations(runs[0]['algorithm'])}"
        )
    return "\n\n".join(out)


def filled(text: str, name: str, content: str) -> str:
    """The document with ``content`` between the two marks of ``name``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError("docs/reduced-protocol.md", f"needs {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--check", action="store_true")
    p.add_argument("--document", type=Path, default=ROOT / "docs" / "reduced-protocol.md")
    p.add_argument("--results", type=Path, default=ROOT / "results" / "methods_r.jsonl")
    args = p.parse_args(argv)
    try:
        by_arm = arms(read(args.results))
        old = args.document.read_text(encoding="utf-8")
        new = filled(filled(old, "methods-r-table", table(by_arm)), "fidelity-cards", cards(by_arm))
    except (UserError, OSError) as e:
        print(f"methods_r: {e}", file=sys.stderr)
        return 2
    if new != old and args.check:
        print("methods_r: docs/reduced-protocol.md is stale; run `python scripts/methods_r.py`", file=sys.stderr)
        return 1
    if new != old:
        write_atomic(args.document, new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
