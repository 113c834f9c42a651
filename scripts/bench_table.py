"""Fill docs/engines.md's tables from results/bench.jsonl; ``--check`` exits 1 when they are stale."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill


def latest(path: Path) -> list[dict[str, Any]]:
    """The last line of each kind of benchmark, processor and load, in the file's order; one with more contestants takes the place of earlier ones with fewer."""
    found: list[tuple[str, set[str], dict[str, Any]]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line.get("benchmark") in ("engines", "engines and peers", "profile"):
            load = {k: v for k, v in line["load"].items() if k != "repeats"}
            key = json.dumps([line["benchmark"], line["processor"], line.get("cores", None), load])
            contestants = set(line.get("seconds", ()))
            found = [f for f in found if f[0] != key or not f[1] <= contestants]
            found.append((key, contestants, line))
    return [line for _, _, line in found]


def table(line: dict[str, Any]) -> str:
    """One benchmark as Markdown."""
    load = line["load"]
    where = f"{line['processor']}, torch {line['torch']}, commit `{line['commit']}`"
    network = f"ResNet-8 of width {load['width']}"
    if line["benchmark"] == "profile":
        names = list(line["parts"])
        rows = [f"| part of a client's round | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for part in line["parts"][names[0]]:
            seconds = (f"{line['parts'][n][part]:.3f}" for n in names)
            rows.append(f"| {part} | {' | '.join(seconds)} |")
        head = (
            f"**Where a client's round goes**: {load['images']} images, {network}; seconds of processor time. {where}."
        )
        return "\n".join([head, "", *rows])
    head = (
        f"**One round**: {load['clients']} clients of {load['images']} images, {load['epochs']} epoch, batch {load['batch']}, {network}; "
        f"{line['cores']} cores, median of {load['repeats']} interleaved repetitions (least to most). {where}."
    )
    rows = [
        "| | seconds | processor seconds | ratio of seconds | ratio of processor seconds |",
        "|---|---|---|---|---|",
    ]
    for name, s in line["seconds"].items():
        rows.append(
            f"| {name} | {_spread(s)} | {_spread(line['core_seconds'][name])} | {line['wall_over_bare_shared'][name]:.2f} "
            f"| {line['over_bare_shared'][name]:.2f} |"
        )
    for precision, limit in line["limit_seconds"].items():
        rows.append(
            f"| this chip's matrix products, {precision} ({line['gflops_a_core'][precision]:g} GFLOP/s a core) | {limit:.2f} | | | |"
        )
    tail = (
        f"Engine beside its busiest worker: {line['overhead']['share']:.1%} of this round, {line['overhead_tiny']['share']:.1%} of a round of "
        f"{line['overhead_tiny']['clients']:,} clients with eight images (width 16). Workers ready after {line['startup_seconds']:g} s."
    )
    if line.get("pss_bytes") and "pss_parts" not in line:
        tail += f" Memory of all processes afterwards: {line['pss_bytes'] / 1e9:.2f} GB (PSS)."
    for name, room in line.get("pss_parts", {}).items():
        if room:
            each = " and ".join(f"{b / 1e9:.2f}" for b in room["workers"])
            tail += f" Most memory (PSS), {name}: {room['together'] / 1e9:.2f} GB (parent {room['parent'] / 1e9:.2f}, workers {each})."
    for name, why in line.get("failed", {}).items():
        tail += f" {name} could not be measured: {why}."
    return "\n".join([head, "", *rows, "", tail])


def _spread(s: list[float]) -> str:
    return f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the tables are stale")
    parser.add_argument("--page", type=Path, default=Path("docs/engines.md"))
    parser.add_argument("--results", type=Path, default=Path("results/bench.jsonl"))
    args = parser.parse_args(argv)
    try:
        stale = fill(args.page, {"bench": "\n\n".join(map(table, latest(args.results)))}, args.check)
    except (UserError, OSError) as e:
        print(f"bench_table: {e}", file=sys.stderr)
        return 2
    if stale and args.check:
        print(f"bench_table: {args.page} is stale; run `python scripts/bench_table.py`", file=sys.stderr)
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
