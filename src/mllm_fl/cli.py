"""The command line, thin: words in, one stage called, one line of error out. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl import __version__
from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.config import Config, Plan
    from mllm_fl.data.federation import DataConfig

STAGES = {
    "run": "all stages of a configuration, every arm and seed; resumes what was interrupted",
    "annotate": "stage 1a alone: a multimodal LLM annotates open images",
    "pretrain": "stage 1b alone: dynamic weighted pretraining of the compact model",
    "federate": "stage 2 alone: the rounds, without alignment",
    "align": "stage 3 alone: align the model of a finished `federate`",
}


def parser() -> argparse.ArgumentParser:
    """The words that are understood; values inside a configuration are overridden by --table.key VALUE."""
    top = argparse.ArgumentParser(
        prog="mllm-fl",
        description="Federated learning on long-tailed images with a multimodal LLM on the server.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"mllm-fl {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in STAGES.items():
        p = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        p.add_argument("config", type=Path, help="a TOML file, see experiments/")
        p.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: ./runs)")
        p.add_argument("--arm", action="append", help="only this arm (may be repeated)")
        p.add_argument("--seed", type=int, action="append", help="this seed instead of the file's (may be repeated)")
        p.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process (default 1)")
        p.add_argument("--json-progress", action="store_true", help=argparse.SUPPRESS)
        p.epilog = (
            "Any value of the configuration: --federate.rounds 3, --data.alpha 0.1, ... (`--help-config` lists them)"
        )
    p = verbs.add_parser("report", help="one self-contained HTML page from run folders", allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")
    p.add_argument("--out", type=Path, default=Path("report.html"))
    p.add_argument("--title", default="mllm-fl")
    p = verbs.add_parser("collect", help="add finished runs to a results file, a line each", allow_abbrev=False)
    p.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")
    p.add_argument("--out", type=Path, required=True, help="for example results/quickstart.jsonl")
    p = verbs.add_parser("data", help="describe, check or pack a federation's data", allow_abbrev=False)
    data = p.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    for verb, text in (("describe", "class counts and who holds what"), ("pack", "one federation as a Parquet folder")):
        q = data.add_parser(verb, help=text, description=text, allow_abbrev=False)
        q.add_argument("source", help="digits, cifar10, cifar100, imagenet-lt, folder:PATH, hf:NAME, pack:PATH")
        q.add_argument("--root", help="folder of the data set (else $MLLM_FL_DATA)")
        q.add_argument("--imbalance-factor", type=float, default=1.0)
        q.add_argument("--partition", default="creff", choices=["creff", "dirichlet", "iid"])
        q.add_argument("--alpha", type=float, default=0.5)
        q.add_argument("--clients", type=int, default=20)
        q.add_argument("--seed", type=int, default=7)
        q.add_argument("--min-size", type=int, default=10, help="smallest client of a dirichlet partition (default 10)")
        q.add_argument("--image-size", type=int, help="pixels a side (default: the source's own)")
        q.add_argument("--manifest", help="a saved manifest that decides who holds what")
        if verb == "describe":
            q.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
            q.add_argument("--save-manifest", type=Path, help="also write who holds what to this file")
        else:
            q.add_argument("--out", type=Path, required=True, help="folder to write")
    q = data.add_parser("check", help="corrupt, duplicate and leaked images", allow_abbrev=False)
    q.add_argument("sources", nargs="+", help="sources; images of one that are in another's test set are leaks")
    q.add_argument("--root", help="folder of the data sets (else $MLLM_FL_DATA)")
    q.add_argument("--json", action="store_true")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 (bad input, one line on stderr), or 130 (interrupted, resumable)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        top = parser()
        args, rest = top.parse_known_args(argv)
        if rest and args.verb not in STAGES:
            top.error(f"unrecognized arguments: {' '.join(rest)}")
        if args.verb in STAGES:
            return _stage(args, rest)
        verbs = {"report": _report, "collect": _collect, "data": _data}
        return verbs[args.verb](args)
    except UserError as e:
        print(f"mllm-fl: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmllm-fl: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(
            f"mllm-fl: {where}{e.strerror or e}; nothing finished is lost, mend it and run the same command",
            file=sys.stderr,
        )
        return 2


def _stage(args: argparse.Namespace, rest: list[str]) -> int:
    from mllm_fl.config import load

    if args.jobs < 1:
        raise UserError("--jobs", f"{args.jobs} is below 1")
    plan = load(args.config)
    configs = [c for c in plan.runs if not args.arm or c.name in args.arm]
    if args.seed:
        configs = list(dict.fromkeys(dataclasses.replace(c, seed=s) for s in args.seed for c in configs))
    missing = sorted(set(args.arm or []) - {c.name for c in plan.runs})
    if missing:
        raise UserError("--arm", f"{missing[0]!r} is not an arm of {args.config}", f"arms: {', '.join(plan.arms)}")
    if rest:
        from mllm_fl.overrides import override

        configs = [override(c, rest) for c in configs]
    from mllm_fl.console import Screen

    command = "mllm-fl " + " ".join(sys.argv[1:]) if sys.argv else "mllm-fl"
    with Screen(json_lines=args.json_progress) as screen:
        if args.verb == "run" and args.jobs > 1 and len(configs) > 1:
            from mllm_fl.jobs import run_jobs

            finals = run_jobs(args.config, configs, args.runs, rest, args.jobs, screen)
        else:
            finals = [_one(args.verb, c, args.runs, screen, command) for c in configs]
    if not args.json_progress:
        _show(args, plan, [f for f in finals if f is not None])
    return 0


def _one(verb: str, config: Config, root: Path, screen: Any, command: str) -> dict[str, Any] | None:
    from mllm_fl.stages import chain

    progress = screen.progress(f"{config.name} seed {config.seed}")
    if verb == "annotate":
        screen.say(f"corpus: {chain.annotate_stage(config, root, progress)}")
        return None
    if verb == "pretrain":
        if config.pretrain is None:
            raise UserError(
                "pretrain", "the configuration has no [pretrain] table", "add it, or an arm that has it: --arm NAME"
            )
        chain.pretrain_stage(config, root, progress)
        screen.say(f"pretrained weights: {chain.pretrain_path(config, root)}")
        return None
    if verb == "federate":
        config = dataclasses.replace(config, align=None)
    if verb == "align":
        return chain.align_finished(config, root, progress)
    final = chain.run(config, root, progress=progress, command=command)
    screen.say(f"run: {chain.run_path(config, root)}")
    return final


def _show(args: argparse.Namespace, plan: Plan, finals: list[dict[str, Any]]) -> None:
    if finals and args.verb in ("run", "federate", "align"):
        from mllm_fl.report.table import compare, to_text

        print(to_text(compare(finals)))


def _report(args: argparse.Namespace) -> int:
    from mllm_fl.report import build

    found = [f for given in args.runs for f in _run_folders(given)]
    corpora = sorted({c for f in found for c in f.parent.glob("corpus-*") if (c / "records.json").exists()})
    print(build(found, args.out, title=args.title, corpus=corpora[0] if corpora else None))
    return 0


def _collect(args: argparse.Namespace) -> int:
    from mllm_fl.results import collect

    lines = collect([f for given in args.runs for f in _run_folders(given)], args.out)
    print(f"{args.out}: {lines} runs")
    return 0


def _run_folders(given: Path) -> list[Path]:
    if (given / "config.toml").exists():
        return [given]
    found = sorted(p.parent for p in given.glob("**/config.toml"))
    if not found:
        raise UserError(given, "no run folder here (none holds a config.toml)", "give a folder under runs/")
    return found


def _data(args: argparse.Namespace) -> int:
    if args.data_verb == "check":
        from mllm_fl.data.check import check

        report = check(args.sources, root=args.root)
        print(json.dumps(report.to_dict()) if args.json else report.text())
        return 0 if report.clean else 1
    from mllm_fl.data.federation import build

    federation = build(_data_config(args))
    if args.data_verb == "describe":
        from mllm_fl.data.describe import render, summary
        from mllm_fl.data.manifest import save

        if args.save_manifest:
            save(federation.manifest, args.save_manifest)
        described = summary(federation)
        print(json.dumps(described) if args.json else render(described, federation.class_names))
        return 0
    from mllm_fl.data.pack import pack

    print(pack(federation, args.out))
    return 0


def _data_config(args: argparse.Namespace) -> DataConfig:
    from mllm_fl.data.federation import DataConfig

    return DataConfig(
        source=args.source, root=args.root, imbalance_factor=args.imbalance_factor, partition=args.partition, alpha=args.alpha,
        clients=args.clients, seed=args.seed,
        min_size=args.min_size, image_size=args.image_size, manifest=args.manifest,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
