"""``methods``, ``check-method``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The two verbs."""
    p = verbs.add_parser("methods", help="every method: paper, hooks, bytes, needs, neutral value", allow_abbrev=False)
    p.add_argument("--markdown", action="store_true", help="as the page docs/methods.md")
    p.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
    p.set_defaults(call=methods)
    p = verbs.add_parser(
        "check-method",
        help="is a method sound: the conformance suite on a class",
        description="Run the conformance suite on a method: a name of `mllm-fl methods`, or my_module:MyMethod found from here.",
        epilog="exit status: 0 every check holds, 1 one fails, 2 no such method",
        allow_abbrev=False,
    )
    p.add_argument("method", metavar="METHOD", help="my_module:MyMethod, or a name")
    p.add_argument("--only", action="append", metavar="CHECK", help="only this check (may be repeated)")
    p.add_argument("--limit", type=float, default=15, metavar="S", help="stop a check after S seconds (default 15)")
    p.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
    p.set_defaults(call=check_method)


def methods(args: argparse.Namespace) -> int:
    """Print the table."""
    from mllm_fl.conformance.table import entries, markdown, render

    if args.json:
        print(json.dumps([e._asdict() for e in entries()]))
    else:
        measured = Path("results/method_costs.jsonl")
        print(markdown(measured if measured.exists() else None) if args.markdown else render(entries()))
    return 0


def check_method(args: argparse.Namespace) -> int:
    """Run the suite, a line a check as it is done; 0 if all hold."""
    import torch

    from mllm_fl.conformance.row import row_of
    from mllm_fl.conformance.suite import run

    torch.set_num_threads(1)
    row = row_of(args.method)
    found = []
    for v in run(row, args.only, args.limit):
        found.append(v)
        if not args.json:
            print(f"{v.status:6}  {v.check:17} {v.sentence}".rstrip(), flush=True)
    failed = [v for v in found if v.status == "fails"]
    if args.json:
        print(json.dumps({"method": args.method, "sound": not failed, "checks": [v._asdict() for v in found]}))
    else:
        waived = sum(v.status == "waived" for v in found)
        print(
            f"{args.method}: {len(failed)} of {len(found)} checks fail" if failed else f"{args.method}: {len(found) - waived} checks hold",
            f"{waived} waived, {sum(v.seconds for v in found):.1f} s", sep=", ", file=sys.stderr,
        )  # fmt: skip
    return 1 if failed else 0
