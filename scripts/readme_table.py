"""Fill a document's table from a results file; ``--check`` exits 1 when it is stale.

``--readme docs/pretraining.md --results results/handover.jsonl`` fills what stands between ``<!-- handover-table -->`` and
``<!-- /handover-table -->``; without arguments it is README.md and results/quickstart.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mllm_fl.engines.checkpoint import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.report.table import compare, to_markdown
from mllm_fl.results import read


def filled(text: str, table: str, place: object, name: str = "quickstart") -> str:
    """The document with ``table`` between the two marks of ``name``.

    Raises:
        UserError: a mark is missing, there are several, or they stand in the wrong order.
    """
    begin, end = f"<!-- {name}-table -->", f"<!-- /{name}-table -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(
            place, f"needs {begin} once and {end} once after it", "add the two lines where the table belongs"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 (``--check`` and stale) or 2 (bad input)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is stale")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results/quickstart.jsonl"))
    args = parser.parse_args(argv)
    try:
        try:
            old = args.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(args.readme, f"cannot be read: {e}") from e
        new = filled(old, to_markdown(compare(read(args.results))), args.readme, args.results.stem)
    except UserError as e:
        print(f"readme_table: {e}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if args.check:
        print(f"readme_table: {args.readme} is stale; run `python scripts/readme_table.py`", file=sys.stderr)
        return 1
    write_atomic(args.readme, new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
