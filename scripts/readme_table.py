"""Fill a document's table from a results file; ``--check`` exits 1 when it is stale.

``--readme docs/pretraining.md --results results/handover.jsonl`` fills what stands between ``<!-- handover-table -->`` and
``<!-- /handover-table -->``; without arguments it is README.md and results/quickstart.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mllm_fl.errors import UserError
from mllm_fl.report.marked import fill
from mllm_fl.report.table import compare, to_markdown
from mllm_fl.results import read


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is stale")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results/quickstart.jsonl"))
    args = parser.parse_args(argv)
    try:
        tables = {f"{args.results.stem}-table": to_markdown(compare(read(args.results)))}
        stale = fill(args.readme, tables, args.check)
    except UserError as e:
        print(f"readme_table: {e}", file=sys.stderr)
        return 2
    if stale and args.check:
        print(f"readme_table: {args.readme} is stale; run `python scripts/readme_table.py`", file=sys.stderr)
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
