"""``runs`` and ``diff``: which runs there are, and in which configured values two of them differ."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError


def add(verbs: Any) -> None:
    """The two verbs."""
    p = verbs.add_parser("runs", help="list the runs with state, progress and headline", allow_abbrev=False)
    p.add_argument(
        "root", nargs="?", type=Path, default=Path("runs"), help="the folder that holds them (default: ./runs)"
    )
    p.add_argument("--watch", action="store_true", help="draw the list again whenever it changes, until interrupted")
    p.add_argument("--every", type=float, default=2.0, help="seconds between two looks of --watch (default 2)")
    p.set_defaults(call=runs)
    p = verbs.add_parser("diff", help="each configured value in which two runs differ", allow_abbrev=False)
    p.add_argument("a", type=Path, help="a run folder")
    p.add_argument("b", type=Path, help="another")
    p.set_defaults(call=diff)


def runs(args: argparse.Namespace) -> int:
    """Print the list; with --watch again and again."""
    from mllm_fl.report.listing import entries, to_text

    if not args.every > 0:
        raise UserError("--every", f"{args.every:g} is not positive")
    shown = ""
    try:
        while True:
            text = to_text(entries(args.root), args.root)
            if text != shown:
                home = "\x1b[H\x1b[2J" if args.watch and sys.stdout.isatty() else ""
                print(home + text, flush=True)
                shown = text
            if not args.watch:
                return 0
            time.sleep(args.every)
    except KeyboardInterrupt:
        return 0


def diff(args: argparse.Namespace) -> int:
    """Print key, value of A and value of B, a line each; nothing but a sentence where there is no difference."""
    from mllm_fl.report.table import MISSING, plain
    from mllm_fl.toml import flatten

    a, b = (flatten(_config(folder)) for folder in (args.a, args.b))
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k, MISSING) != b.get(k, MISSING)]
    if not keys:
        print(f"no difference: all {len(a)} values are equal")
        return 0
    rows = [("", str(args.a), str(args.b)), *((k, str(a.get(k, MISSING)), str(b.get(k, MISSING))) for k in keys)]
    first, second = (max(len(plain(row[i])) for row in rows) for i in (0, 1))
    for key, x, y in rows:
        print(f"{plain(key):<{first}}  {plain(x):<{second}}  {plain(y)}".rstrip())
    return 0


def _config(folder: Path) -> dict[str, Any]:
    from mllm_fl.toml import read_toml

    if not (folder / "config.toml").exists():
        raise UserError(folder, "not a run folder (it has no config.toml)", "give a folder under runs/")
    return read_toml(folder / "config.toml")
