"""``make bench``: this library, a bare loop, Flower's simulation and pfl-research, interleaved, each peer in an environment of its own.

    make bench                              (or python benchmarks/run.py --repeats 3 --clients 8 --images 600 --width 64)

Appends one JSON line to results/bench.jsonl; ``python scripts/bench_table.py`` makes docs/engines.md's table from it. A peer that cannot be
installed or run is listed with the reason. Every repetition runs all contestants once, in turn from either end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mllm_fl.engines.cores import usable_cores

ROOT = Path(__file__).resolve().parents[1]
PEERS = {  # name -> (script, what pip installs beside torch and what our network and data need)
    "flower": ("flower_round.py", ["flwr[simulation]>=1.41,<1.43"]),
    "pfl": ("pfl_round.py", ["pfl[pytorch]==0.6.0"]),
}
BESIDE = ["safetensors", "pillow", "filelock", "pyarrow"]


def environment_of(name: str, wanted: list[str]) -> Path:
    """The peer's Python, in build/peers/NAME; made if it is not there, with the torch version that this library runs on.

    Raises:
        subprocess.CalledProcessError: pip failed; its last line is the reason.
    """
    import torch

    folder = ROOT / "build" / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        same = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([*pip, same, *BESIDE, *wanted], check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return python


def ask(command: list[str]) -> dict[str, Any]:
    """The JSON object on the last line that a contestant prints."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=3600, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> None:
    """Play all contestants ``--repeats`` times and keep what came out."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("clients", 8), ("images", 600), ("width", 64), ("repeats", 3), ("tiny", 1000)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--no-peers", action="store_true", help="ours and the bare loop alone")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "bench.jsonl")
    args = p.parse_args(argv)
    size = [x for k in ("clients", "images", "width") for x in (f"--{k}", str(getattr(args, k)))]
    ours = [sys.executable, "-m", "mllm_fl.cli", "bench", "--json", "--repeats", "1", *size, "--tiny"]
    commands: dict[str, list[str]] = {"ours": ours}
    failed: dict[str, str] = {}
    for name, (script, wanted) in {} if args.no_peers else PEERS.items():
        try:
            python = environment_of(name, wanted)
            commands[name] = [str(python), str(ROOT / "benchmarks" / "peers" / script), *size, "--rounds", "2"]
            if name == "pfl":
                commands[name] += ["--threads", str(usable_cores())]
        except (subprocess.CalledProcessError, OSError) as e:
            failed[name] = _last(e)
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for i in range(args.repeats):
        for name in list(commands) if i % 2 == 0 else list(commands)[::-1]:
            if name in failed:
                continue
            extra = [str(args.tiny if i == 0 else 50)] if name == "ours" else []
            try:
                said[name].append(ask([*commands[name], *extra]))
                print(f"{i + 1}/{args.repeats} {name}: {said[name][-1]['seconds']}", flush=True)
            except (subprocess.SubprocessError, ValueError, IndexError) as e:
                if name == "ours":
                    raise
                failed[name] = _last(e)
    line = merged(said, failed, args.repeats)
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def merged(said: dict[str, list[dict[str, Any]]], failed: dict[str, str], repeats: int) -> dict[str, Any]:
    """One line from all repetitions: the first of ours, with the seconds of all of them, and the peers beside it."""
    first, cores = said["ours"][0], said["ours"][0]["cores"]
    line = first | {"benchmark": "engines and peers", "load": first["load"] | {"repeats": repeats}, "failed": failed}
    for kind in ("seconds", "core_seconds"):
        line[kind] = {n: [x for one in said["ours"] for x in one[kind][n]] for n in first[kind]}
        for name, found in said.items():
            if name != "ours" and name not in failed:
                line[kind][found[0]["peer"]] = [round(statistics.median(one[kind]), 3) for one in found]
    for key, kind, shared in (("wall_over_bare_shared", "seconds", cores), ("over_bare_shared", "core_seconds", 1)):
        bare = line[kind]["bare"]
        line[key] = {
            n: round(statistics.median(a * shared / b for a, b in zip(v, bare, strict=True)), 3)
            for n, v in line[kind].items()
        }
    line["overhead"] = first["overhead"] | {
        "share": round(statistics.median(one["overhead"]["share"] for one in said["ours"]), 4)
    }
    return line


def _last(e: BaseException) -> str:
    text = str(getattr(e, "stderr", "") or e).strip().splitlines()
    return text[-1] if text else type(e).__name__


if __name__ == "__main__":
    main()
