"""Fill docs/deploy.md's tables from results/deploy.jsonl; ``--check`` exits 1 when they are stale.

Lines come from ``MLLM_FL_FAULTS=results/deploy.jsonl make test-deploy`` (faults) and ``python benchmarks/flower.py`` (seconds a round).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill

ROOT = Path(__file__).resolve().parents[1]
DID = {
    "a client's process": "Flower started another if it had not taken its message yet; else said so after 70 s, and the round was played again",
    "a SuperNode": "its supervisor started it again until the SuperLink took it; the round was played again",
    "the ServerApp": "`mllm-fl deploy resume`",
    "the SuperLink": "its supervisor started it again, the sites came back by themselves; `mllm-fl deploy resume`",
    "the SuperLink's executor": "its supervisor missed it and started the SuperLink again; `mllm-fl deploy resume`",
}


def faults(rows: list[dict[str, Any]]) -> str:
    """The last measurement of each fault, and where it was measured."""
    last = {r["killed"]: r for r in rows if "killed" in r}
    lines = [
        "| SIGKILL in the middle of a round to | what the federation did | seconds until the round went on | bytes lost |",
        "|---|---|---|---|",
    ]
    lines += [f"| {k} | {DID[k]} | {last[k]['seconds']:.0f} | {last[k]['bytes_lost']} |" for k in DID if k in last]
    return "\n".join([*lines, "", *measured([last[k] for k in DID if k in last])])


def cost(rows: list[dict[str, Any]]) -> str:
    """The last measurement of each number of nodes, with and without a worker."""
    last = {(r["nodes"], r["worker"]): r for r in rows if "seconds_a_round" in r}
    if not last:
        return "Not measured yet: `python benchmarks/flower.py`, then `python scripts/deploy_tables.py`."
    lines = [
        "| nodes on one machine | a process for every message | a process that stays | rounds |",
        "|---|---|---|---|",
    ]
    for nodes in sorted({n for n, _ in last}):
        pair = [last.get((nodes, worker)) for worker in (False, True)]
        said = [
            f"{r['seconds_a_round']:.1f} s ({min(r['seconds'][1:]):.1f} to {max(r['seconds'][1:]):.1f})" if r else ""
            for r in pair
        ]
        lines.append(f"| {nodes} | {' | '.join(said)} | {max(r['rounds'] for r in pair if r)} |")
    return "\n".join([*lines, "", "Median (and range) of seconds a round.", *measured(list(last.values()))])


def measured(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence about machine, commits and what else ran."""
    if not rows:
        return []
    commits = ", ".join(dict.fromkeys(str(r["commit"])[:9] for r in rows))
    loads = sorted(r["load"] for r in rows)
    machine = ", ".join(dict.fromkeys(f"{r['processor']}, {r['cores']} cores" for r in rows))
    return [f"{machine}; commit {commits}; load average {loads[0]:.1f} to {loads[-1]:.1f}, what is measured included."]


def main() -> int:
    """Write the page, or compare it."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--check", action="store_true")
    check = args.parse_args().check
    source = ROOT / "results" / "deploy.jsonl"
    if not source.exists():
        print(f"{source}: nothing measured yet; see `--help`", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    try:
        stale = fill(ROOT / "docs" / "deploy.md", {"faults": faults(rows), "cost": cost(rows)}, check)
    except UserError as e:
        print(f"deploy_tables: {e}", file=sys.stderr)
        return 2
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main())
