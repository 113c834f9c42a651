"""``report`` and ``collect``: what becomes of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError


def add(verbs: Any) -> None:
    """The verbs that read run folders."""
    p = verbs.add_parser("report", help="one self-contained HTML page from run folders", allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")
    p.add_argument("--out", type=Path, default=Path("report.html"))
    p.add_argument("--title", default="mllm-fl")
    p.set_defaults(call=report)
    p = verbs.add_parser("collect", help="add finished runs to a results file, a line each", allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")
    p.add_argument("--out", type=Path, required=True, help="for example results/quickstart.jsonl")
    p.set_defaults(call=collect)


def report(args: argparse.Namespace) -> int:
    """Write one HTML page."""
    from mllm_fl.report import build

    found = [f for given in args.runs for f in run_folders(given)]
    corpora = sorted({c for f in found for c in f.parent.glob("corpus-*") if (c / "records.json").exists()})
    print(build(found, args.out, title=args.title, corpus=corpora[0] if corpora else None))
    return 0


def collect(args: argparse.Namespace) -> int:
    """Add a line per finished run to a results file."""
    from mllm_fl.results import collect as gather

    lines = gather([f for given in args.runs for f in run_folders(given)], args.out)
    print(f"{args.out}: {lines} runs")
    return 0


def run_folders(given: Path) -> list[Path]:
    """The run folders that a path names or holds."""
    if (given / "config.toml").exists():
        return [given]
    found = sorted(p.parent for p in given.glob("**/config.toml"))
    if not found:
        raise UserError(given, "no run folder here (none holds a config.toml)", "give a folder under runs/")
    return found
