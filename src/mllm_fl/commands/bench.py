"""``bench``: how fast one round is on this machine, beside a bare loop."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """The verb."""
    text = "time one round on this machine: a bare training loop beside this library's engines"
    p = verbs.add_parser("bench", help=text, description=text, allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="two minutes in place of fifteen")
    p.add_argument("--profile", action="store_true", help="where a client's round goes, by part, instead")
    p.add_argument("--width", type=int, help="channels of ResNet-8's first stage (default 64)")
    p.add_argument("--clients", type=int)
    p.add_argument("--images", type=int, help="of each client")
    p.add_argument("--repeats", type=int)
    p.add_argument("--tiny", type=int, help="clients of eight images each (default 1000)")
    p.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
    p.add_argument(
        "--out", type=Path, help="add the JSON object as a line to this file, for example results/bench.jsonl"
    )
    p.set_defaults(call=bench)


def bench(args: argparse.Namespace) -> int:
    """Measure, show, and keep."""
    import dataclasses

    from mllm_fl.console import Screen
    from mllm_fl.engines.bench import QUICK, Load, measure
    from mllm_fl.errors import UserError
    from mllm_fl.runs import environment

    given = {k: v for k in ("width", "clients", "images", "repeats", "tiny") if (v := getattr(args, k)) is not None}
    for key, value in given.items():
        if value < 1:
            raise UserError(f"--{key}", f"{value} is below 1")
    load = dataclasses.replace(QUICK if args.quick else Load(), **given)
    where = environment()
    machine = {k: where[k] for k in ("commit", "mllm_fl", "torch", "python", "processor", "system")}
    if args.profile:
        from mllm_fl.engines.profile import profile

        said = {"benchmark": "profile", "load": vars(load), "parts": profile(load), **machine}
    else:
        with Screen() as screen:
            said = measure(load, screen.progress("bench")) | machine
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(said) + "\n")
    print(json.dumps(said) if args.json else _parts(said) if args.profile else _text(said))
    return 0


def _parts(said: dict[str, Any]) -> str:
    rows = []
    for name, parts in said["parts"].items():
        rows += [f"{name}: seconds of processor time", *(f"  {part:<28}{s:8.3f}" for part, s in parts.items())]
    return "\n".join(rows)


def _text(said: dict[str, Any]) -> str:
    import statistics

    rows = [f"{'one round':<34}{'seconds':>9}{'core-s':>9}{'of bare':>9}{'(core-s)':>9}"]
    for name, s in said["seconds"].items():
        rows.append(
            f"{name:<34}{statistics.median(s):9.2f}{statistics.median(said['core_seconds'][name]):9.2f}"
            f"{said['wall_over_bare_shared'][name]:9.2f}{said['over_bare_shared'][name]:9.2f}"
        )
    rows.append(f"'of bare': seconds over the bare loop's, which are shared between {said['cores']} cores;")
    rows.append("'(core-s)': processor seconds over the bare loop's processor seconds.")
    for p, g in said["gflops_a_core"].items():
        rows.append(f"Matrix products alone, {p}, {g:g} GFLOP/s a core: {said['limit_seconds'][p]:.2f} s.")
    rows.append(
        f"Not computing, busiest worker: {said['overhead']['share']:.1%} of a round, "
        f"{said['overhead_tiny']['share']:.1%} with {said['overhead_tiny']['clients']:,} tiny clients."
    )
    rows.append(f"Workers ready in {said['startup_seconds']:g} s.")
    for name, room in said["pss_parts"].items():
        if room:
            each = " + ".join(f"{b / 1e9:.2f}" for b in room["workers"])
            rows.append(f"Memory, {name}: {room['together'] / 1e9:.2f} GB")
            rows.append(f"  (this process {room['parent'] / 1e9:.2f}, workers {each}).")
    return "\n".join(rows)
