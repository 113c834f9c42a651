"""Fill docs/overhead.md: what stages 1 and 3 cost beside the federation, from the ``overhead`` of results/quickstart.jsonl; ``--check`` exits 1 when it is stale."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill
from mllm_fl.results import read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "overhead.md"
ARMS = ("fedavg", "align", "pretrain", "pretrain-align")  # neither stage, one, the other, both
Read = Callable[[dict[str, Any]], float | None]


def flop(part: str) -> Read:
    return lambda r: r["overhead"]["flop"].get(part, 0)


def seconds(part: str) -> Read:
    return lambda r: r["seconds"].get(part, 0)


LINES: dict[str, tuple[Read, float, str]] = {  # what -> how it is read, divisor, format
    "clients: GFLOP": (flop("clients"), 1e9, "{:,.0f}"),
    "server, pretraining: GFLOP": (flop("pretrain"), 1e9, "{:,.0f}"),
    "server, alignment: GFLOP": (flop("align"), 1e9, "{:,.0f}"),
    "evaluation: GFLOP": (flop("evaluate"), 1e9, "{:,.0f}"),
    "clients: seconds": (seconds("clients"), 1, "{:,.0f}"),
    "annotation: seconds": (seconds("annotate"), 1, "{:,.0f}"),
    "pretraining: seconds": (seconds("pretrain"), 1, "{:,.0f}"),
    "aggregation: seconds": (seconds("server"), 1, "{:.1f}"),
    "alignment: seconds": (seconds("align"), 1, "{:,.0f}"),
    "a client's visit: GFLOP": (lambda r: r["overhead"]["per_visit"]["flop"], 1e9, "{:.2f}"),
    "a client's visit: seconds": (lambda r: r["overhead"]["per_visit"]["seconds"], 1, "{:.2f}"),
    "a client's visit: kB up": (lambda r: r["overhead"]["per_visit"]["bytes_up"], 1e3, "{:,.0f}"),
    "a client's visit: kB down": (lambda r: r["overhead"]["per_visit"]["bytes_down"], 1e3, "{:,.0f}"),
    "whole run: MB up": (lambda r: r["bytes_up"], 1e6, "{:,.1f}"),
    "whole run: MB down": (lambda r: r["bytes_down"], 1e6, "{:,.1f}"),
    "server process: peak MB": (lambda r: r["overhead"]["peak_bytes"]["process"], 1e6, "{:,.0f}"),
    "energy: joules": (lambda r: r["overhead"]["joules"]["cpu"], 1, "{:,.0f}"),
    "bill: questions answered": (lambda r: (r["overhead"]["annotation"] or {"answers": 0})["answers"], 1, "{:,.0f}"),
    "bill: tokens in and out": (
        lambda r: sum((r["overhead"]["annotation"] or {}).get(k, 0) for k in ("prompt_tokens", "completion_tokens")), 1, "{:,.0f}",
    ),
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, a line a measure and a column an arm; where they were measured stands below."""
    by = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    out = [f"| | {' | '.join(ARMS)} |", f"|:---|{'---:|' * len(ARMS)}"]
    for what, (value, unit, form) in LINES.items():
        cells = []
        for arm in ARMS:
            seen = [v for r in by[arm] if (v := value(r)) is not None]
            cells.append(form.format(median(seen) / unit) if seen else "not measured")
        out.append(f"| {what} | {' | '.join(c if c not in ('0', '0.0') else '–' for c in cells)} |")
    used = [r for arm in ARMS for r in by[arm]]
    commits = ", ".join(sorted({r["environment"]["commit"] for r in used}))
    machine = ", ".join(sorted({f"{r['environment']['processor']}, {r['environment']['cores']} cores" for r in used}))
    seeds = ", ".join(map(str, sorted({r["seed"] for r in used})))
    out += ["", f"Medians over seeds {seeds}. {machine}; commit {commits}. {used[0]['overhead']['flop_rule'].capitalize()}."]  # fmt: skip
    return "\n".join(out)


def main() -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--check", action="store_true")
    p.add_argument("--results", type=Path, default=ROOT / "results" / "quickstart.jsonl")
    args = p.parse_args()
    try:
        stale = fill(PAGE, {"overhead": table(read(args.results))}, args.check)
    except UserError as e:
        print(f"overhead_table: {e}", file=sys.stderr)
        return 2
    if stale and args.check:
        print(f"overhead_table: {PAGE.name} is stale; run `python scripts/overhead_table.py`", file=sys.stderr)
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
