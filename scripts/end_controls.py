"""Stage 3's controls, once after the last round, on finished runs of FedAvg: ``python scripts/end_controls.py experiments/alignment_r.toml --seeds 0 1 2``.

What ``mllm-fl align RUN`` does, with each control in turn: a minute a seed where the same arms in every round cost ten. A line a control and seed goes
to ``--out``; the run folders are those of ``mllm-fl run FILE --arm fedavg``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from mllm_fl.atomic import write_atomic
from mllm_fl.config import load
from mllm_fl.errors import UserError
from mllm_fl.results import read
from mllm_fl.stages.align import Control
from mllm_fl.stages.chain import align_finished, run_path

CONTROLS: tuple[Control | None, ...] = (
    "ce",
    "kl",
    "uniform",
    "wrong",
    None,
)  # the last one's model stays in the run folder


def main() -> int:
    """Returns 0, or 2 on bad input."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("file", type=Path)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--runs", type=Path, default=Path("runs"))
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    out = args.out or Path("results") / f"{args.file.stem}_end.jsonl"
    lines = {(r["arm"], r["seed"]): r for r in (read(out) if out.exists() else [])}
    try:
        for seed in args.seeds:
            plain, full = (c for c in load(args.file, {"seed": seed}).runs if c.name in ("fedavg", "align"))
            assert full.align is not None
            for control in CONTROLS:
                config = dataclasses.replace(plain, align=dataclasses.replace(full.align, control=control, when="end"))
                found = align_finished(config, args.runs, run=run_path(plain, args.runs))
                found |= {"arm": f"once: {control or 'align'}", "seed": seed}
                lines[found["arm"], seed] = found
                print(f"{found['arm']} seed {seed}: {found['last']['accuracy']:.1%}", file=sys.stderr, flush=True)
            rows = sorted(lines.values(), key=lambda r: (r["arm"], r["seed"]))
            write_atomic(out, "".join(json.dumps(r) + "\n" for r in rows).encode())
    except UserError as e:
        print(f"end_controls: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
