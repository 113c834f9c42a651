"""``run``, ``pretrain``, ``federate``, ``align``: the stages of a configuration; ``annotate`` has a module of its own."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.config import Config, Plan
    from mllm_fl.events import Event, Progress

STAGES = {
    "run": "all stages of a configuration, every arm and seed; resumes what was interrupted",
    "pretrain": "stage 1b alone: dynamic weighted pretraining of the compact model",
    "federate": "stage 2 alone: the rounds, without alignment",
    "align": "stage 3 alone: align the model of a finished `federate`",
}


def add(verbs: Any) -> None:
    """One verb a stage; any value of the configuration is overridden by --table.key VALUE."""
    for verb, text in STAGES.items():
        p = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        run = ", or the folder of a finished `federate`" if verb == "align" else ""
        p.add_argument("config", type=Path, help=f"a TOML file, see experiments/{run}")
        p.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: ./runs)")
        p.add_argument("--arm", action="append", help="only this arm (may be repeated)")
        p.add_argument("--seed", type=int, action="append", help="this seed instead of the file's (may be repeated)")
        p.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process (default 1)")
        p.add_argument("--json-progress", action="store_true", help=argparse.SUPPRESS)
        p.add_argument(
            "--track",
            action="append",
            default=[],
            metavar="NAME",
            help="also show the rounds to tensorboard, trackio or wandb",
        )
        if verb == "federate":
            p.add_argument(
                "--from",
                dest="source",
                type=Path,
                metavar="RUN",
                help="a finished FedAvg run that a post-hoc method starts from",
            )
        p.epilog = (
            "Any value of the configuration: --federate.rounds 3, --data.alpha 0.1, ... (`--help-config` lists them)"
        )
        p.set_defaults(call=stage, overrides=True)


def stage(args: argparse.Namespace, rest: list[str]) -> int:
    """Run one stage for every arm and seed asked for; ``rest`` holds the overrides."""
    from mllm_fl.config import load

    if args.jobs < 1:
        raise UserError("--jobs", f"{args.jobs} is below 1")
    if args.track:
        from mllm_fl.trackers import check

        check(args.track)
    folder = args.config if args.verb == "align" and args.config.is_dir() else None
    plan = load(args.config) if folder is None else _plan_of(folder)
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

            mirrored = [word for name in args.track for word in ("--track", name)]
            finals = run_jobs(args.config, configs, args.runs, rest + mirrored, args.jobs, screen)
        else:
            source = getattr(args, "source", None)
            finals = [_one(args.verb, c, args.runs, screen, command, source or folder, args.track) for c in configs]
    if not args.json_progress:
        _show(args, plan, [f for f in finals if f is not None])
    return 0


def _plan_of(folder: Path) -> Plan:
    """The finished run in ``folder`` as it was configured, with [align] at its defaults: overrides say the rest.

    Raises:
        UserError: no run folder, or one whose rounds were aligned already.
    """
    from mllm_fl.config import Plan, from_dict
    from mllm_fl.stages.align import AlignConfig
    from mllm_fl.toml import read_toml

    place = folder / "config.toml"
    if not place.exists():
        raise UserError(
            folder, "is not a run folder (it has no config.toml)", "give a folder under runs/, or a TOML file"
        )
    config = from_dict(read_toml(place), str(place))
    if config.align is not None:
        raise UserError(folder, "was aligned in its own rounds", "name a run of `mllm-fl federate`")
    return Plan(place, (dataclasses.replace(config, align=AlignConfig()),), (config.name,))


def _one(
    verb: str, config: Config, root: Path, screen: Any, command: str, source: Path | None, track: list[str]
) -> dict[str, Any] | None:
    from mllm_fl.stages import chain

    progress = screen.progress(f"{config.name} seed {config.seed}")
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
        if source is not None:
            from mllm_fl.stages.posthoc import from_finished

            return from_finished(config, source, root, progress, command)
    if verb == "align":
        return chain.align_finished(config, root, progress, source)
    final = _mirrored(config, root, progress, command, screen, track)
    screen.say(f"run: {chain.run_path(config, root)}")
    return final


def _mirrored(
    config: Config, root: Path, progress: Progress, command: str, screen: Any, track: list[str]
) -> dict[str, Any]:
    """The run, shown to trackers after each round."""
    from mllm_fl.stages import chain

    if not track:
        return chain.run(config, root, progress=progress, command=command)
    from mllm_fl.trackers import Mirror

    mirror = Mirror(chain.run_path(config, root), track, screen.say)

    def both(event: Event) -> None:
        progress(event)
        if event.stage == "federate":
            mirror.look()

    try:
        return chain.run(config, root, progress=both, command=command)
    finally:
        mirror.close()


def _show(args: argparse.Namespace, plan: Plan, finals: list[dict[str, Any]]) -> None:
    if finals and args.verb in ("run", "federate", "align"):
        from mllm_fl.report.table import compare, to_text

        print(to_text(compare(finals)))
