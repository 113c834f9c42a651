"""results/*.jsonl: one line per finished run, committed; every table in the documents is generated from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.runs import read_final, read_rows

WAY_OUT = "delete that line, and collect its run again"


def collect(folders: Sequence[Path], out: Path) -> int:
    """Add the finished runs among ``folders`` to ``out``, a line per run; returns how many lines it holds then.

    A run is known by its name and configuration hash: collecting it again replaces its line. Unfinished runs are left out.

    Raises:
        UserError: none of the folders is a finished run.
    """
    finals = [read_final(f / "final.json") for f in folders if (f / "final.json").exists()]
    if not finals:
        raise UserError(out, "none of the folders holds a finished run (final.json)")
    lines = {(r["name"], r["config_hash"]): r for r in read_rows(out, WAY_OUT)}
    lines |= {(r["name"], r["config_hash"]): r for r in finals}
    rows = sorted(lines.values(), key=lambda r: (r["experiment"], r["arm"], r["seed"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, "".join(json.dumps(r) + "\n" for r in rows).encode())
    return len(rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a results file, as final.json holds them.

    Raises:
        UserError: no such file, or a broken line (with its number).
    """
    if not path.exists():
        raise UserError(path, "no such results file")
    return read_rows(path, WAY_OUT)
