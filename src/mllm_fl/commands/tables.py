"""``table`` and ``figure``: the paper's, from results files, with our numbers beside the published ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError


def add(verbs: Any) -> None:
    """The two verbs."""
    p = verbs.add_parser("table", help="the paper's Table 2, 3 or 4 with our numbers beside it", allow_abbrev=False)
    p.add_argument("number", type=int, help="2, 3 or 4")
    p.add_argument("results", nargs="*", type=Path, help="results files (default: results/*.jsonl)")
    p.add_argument("--rule", default="mean_last", help="which accuracy of a run: last, mean_last (default) or max")
    p.add_argument("--format", default="markdown", choices=["markdown", "csv", "latex"])
    p.set_defaults(call=table)
    p = verbs.add_parser("figure", help="the paper's Figure 3 or 4 from results files", allow_abbrev=False)
    p.add_argument("number", type=int, help="3 (curves over rounds) or 4 (confusion matrices)")
    p.add_argument("results", nargs="*", type=Path, help="results files (default: results/*.jsonl)")
    p.add_argument("--out", type=Path, help="the HTML file (default: figure3.html or figure4.html)")
    p.set_defaults(call=figure)


def table(args: argparse.Namespace) -> int:
    """Print the table, and one for each other protocol."""
    from mllm_fl.report.paper import sheets
    from mllm_fl.report.sheets import render

    print("\n".join(render(s, args.format) for s in sheets(args.number, _finals(args.results), args.rule)), end="")
    return 0


def figure(args: argparse.Namespace) -> int:
    """Write the figure as one self-contained page."""
    from mllm_fl.report.figures import build

    print(build(args.number, _finals(args.results), args.out or Path(f"figure{args.number}.html")))
    return 0


def _finals(given: list[Path]) -> list[dict[str, Any]]:
    """The lines of the results files that are finished runs; benchmarks' lines are none."""
    from mllm_fl.report.table import number
    from mllm_fl.results import WAY_OUT, read

    paths = given or sorted(Path("results").glob("*.jsonl"))
    if not paths:
        raise UserError("results", "no results file here", "name one, or run `mllm-fl collect RUNS --out FILE`")
    found = []
    for path in paths:
        rows = list(enumerate(read(path), 1))
        if given and not rows:
            raise UserError(path, "holds no run", "name a file that `mllm-fl collect` wrote")
        for n, row in rows:
            run = isinstance(row, dict) and "arm" in row and "last" in row
            if run and number(row, "last", "accuracy") is not None:
                found.append(row)
            elif given or run or not isinstance(row, dict):  # benchmarks and curves among results/*.jsonl are no runs
                raise UserError(f"{path}:{n}", "is no finished run (arm, and last.accuracy as a number)", WAY_OUT)
    return found
