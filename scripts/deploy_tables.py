"""Fill docs/deploy.md's tables from results/deploy.jsonl; ``--check`` exits 1 when they are stale.

Lines come from ``MLLM_FL_FAULTS=results/deploy.jsonl make test-deploy`` (faults) and ``python benchmarks/flower.py`` (seconds a round).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mllm_fl.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[1]
DID = {
    "a client's process": "the SuperLink noticed; the round was played again",
    "a SuperNode": "its supervisor started it again, the server noticed; the round was played again",
    "the ServerApp": "`mllm-fl deploy resume`",
    "the SuperLink": "its supervisor started it again, the sites came back by themselves; `mllm-fl deploy resume`",
}


def faults(rows: list[dict[str, Any]]) -> str:
    """The last measurement of each fault."""
    last = {r["killed"]: r for r in rows if "killed" in r}
    lines = [
        "| SIGKILL in the middle of a round to | what the federation did | seconds until the run had gone on to its end | bytes lost |",
        "|---|---|---|---|",
    ]
    lines += [f"| {k} | {DID[k]} | {last[k]['seconds']:.0f} | {last[k]['bytes_lost']} |" for k in DID if k in last]
    return "\n".join(lines)


def cost(rows: list[dict[str, Any]]) -> str:
    """The last measurement of each number of nodes, with and without a worker."""
    last = {(r["nodes"], r["worker"]): r for r in rows if "seconds_a_round" in r}
    lines = [
        "| nodes on one machine | process that stays | median seconds a round | rounds | load average |",
        "|---|---|---|---|---|",
    ]
    for (nodes, worker), r in sorted(last.items()):
        lines.append(
            f"| {nodes} | {'yes' if worker else 'no'} | {r['seconds_a_round']:.1f} | {r['rounds']} | {r['load']:.1f} |"
        )
    return "\n".join(lines)


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
    page = ROOT / "docs" / "deploy.md"
    old = text = page.read_text()
    for name, table in (("faults", faults(rows)), ("cost", cost(rows))):
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->", f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->", text, flags=re.S
        )
    if check:
        return int(text != old)
    write_atomic(page, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
