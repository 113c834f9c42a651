"""``annotate``: stage 1a alone, with its caps, its rates, and what it will cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.config import Config
    from mllm_fl.stages.annotate_config import AnnotateConfig

TEXT = "stage 1a alone: a multimodal LLM annotates open images; the same command resumes, and pays for nothing twice"
SHORT = {  # option -> key of [annotate], type, help
    "max-cost": ("max_cost", float, "stop when the corpus has cost so much, in the price table's currency"),
    "max-requests": ("max_requests", int, "stop after so many answered calls, those of earlier runs included"),
    "rpm": ("requests_per_minute", float, "requests per minute, of this process"),
    "tpm": ("tokens_per_minute", float, "tokens per minute, of this process"),
    "concurrency": ("concurrency", int, "requests in flight at most"),
    "prices": ("prices", str, 'a TOML file: ["model"] input = 0.15, output = 0.6 (per million tokens)'),
}


def add(verbs: Any) -> None:
    """The verb; any other value of [annotate] is overridden by ``--annotate.key VALUE``."""
    p = verbs.add_parser("annotate", help=TEXT.partition(";")[0], description=TEXT, allow_abbrev=False)
    p.add_argument("config", type=Path, help="a TOML file with a table [annotate], see experiments/")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: ./runs)")
    p.add_argument("--arm", action="append", help="only this arm's corpus (may be repeated)")
    p.add_argument("--seed", type=int, action="append", help=argparse.SUPPRESS)  # a corpus has a seed of its own
    p.add_argument("--dry-run", action="store_true", help="say what it would ask, cost and take; ask nothing")
    for option, (_, kind, text) in SHORT.items():
        p.add_argument(f"--{option}", type=kind, metavar="N" if kind is not str else "FILE", help=text)
    p.add_argument("--retry", action="store_true", help="ask the failed ones of a finished corpus again")
    p.add_argument(
        "--batch", action="store_true", help="hand in files of OpenAI's Batch form instead of single requests"
    )
    p.add_argument("--no-wait", action="store_true", help="with --batch: hand in, fetch what is done, and end")
    p.add_argument("--json-progress", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--track", action="append", default=[], help=argparse.SUPPRESS)
    p.epilog = "Any value of the configuration: --annotate.images 600000, ... (`--help-config` lists them)"
    p.set_defaults(call=annotate, overrides=True)


def annotate(args: argparse.Namespace, rest: list[str]) -> int:
    """Make each corpus that the configuration names, once."""
    from mllm_fl.console import Screen

    wanted = _wanted(args, rest)
    if args.dry_run:
        from mllm_fl.stages.annotate_plan import estimate

        plans = [estimate(c.annotate, path) for path, c in wanted.items() if c.annotate is not None]
        print("\n".join(json.dumps(dataclasses.asdict(p)) if args.json_progress else p.text() for p in plans))
        return 0
    with Screen(json_lines=args.json_progress) as screen:
        for config in wanted.values():
            path = _one(args, config, screen)
            if path is not None:
                screen.say(f"corpus: {path}")
                screen.say(_summary(path))
    return 0


def _one(args: argparse.Namespace, config: Config, screen: Any) -> Path | None:
    from mllm_fl.annotate.engine import Pending
    from mllm_fl.stages import chain

    try:
        return chain.annotate_stage(
            config, args.runs, screen.progress(config.name), retry=args.retry, wait=not args.no_wait
        )
    except Pending as e:
        screen.say(str(e))
        return None


def _summary(folder: Path) -> str:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    bill = card.get("bill") or {}
    paid = f", {bill['requests']:,} calls" if bill else ""
    paid += f", cost {bill['cost']:.4g}" if bill.get("cost") is not None else ""
    failed = sum(card["failures"].values())
    return f"{card['records']:,} records of {card['images']:,} pictures, {failed:,} questions failed{paid}"


def _wanted(args: argparse.Namespace, rest: list[str]) -> dict[Path, Config]:
    """Corpus folder -> a configuration that makes it."""
    from mllm_fl.config import load
    from mllm_fl.stages import chain

    plan = load(args.config)
    missing = sorted(set(args.arm or []) - {c.name for c in plan.runs})
    if missing:
        raise UserError("--arm", f"{missing[0]!r} is not an arm of {args.config}", f"arms: {', '.join(plan.arms)}")
    configs = [c for c in plan.runs if c.annotate is not None and (not args.arm or c.name in args.arm)]
    if rest:
        from mllm_fl.overrides import override

        configs = [override(c, rest) for c in configs]
    out: dict[Path, Config] = {}
    for config in configs:
        if config.annotate is not None:
            config = dataclasses.replace(config, annotate=_with(config.annotate, args))
            out.setdefault(chain.corpus_path(config, args.runs), config)
    if not out:
        raise UserError("annotate", "no [annotate] table", "add [annotate], or name an arm that has it: --arm NAME")
    return out


def _with(config: AnnotateConfig, args: argparse.Namespace) -> AnnotateConfig:
    given: dict[str, Any] = {key: getattr(args, option.replace("-", "_")) for option, (key, _, _) in SHORT.items()}
    given = {key: value for key, value in given.items() if value is not None}
    if args.batch:
        given["batch"] = True
    return dataclasses.replace(config, **given)
