"""The command line, thin: words in, one command called, one line of error out. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from mllm_fl import __version__
from mllm_fl.commands import annotate, bench, corpus, data, deploy, methods, pages, runs, stages, tables
from mllm_fl.errors import UserError

FAMILIES = (
    stages,
    annotate,
    corpus,
    runs,
    pages,
    tables,
    data,
    methods,
    bench,
    deploy,
)  # in the order of `mllm-fl --help`


def parser() -> argparse.ArgumentParser:
    """All words that are understood; ``call`` of the parsed arguments is the function that does it."""
    top = argparse.ArgumentParser(
        prog="mllm-fl",
        description="Federated learning on long-tailed images with a multimodal LLM on the server.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"mllm-fl {__version__}")
    top.set_defaults(overrides=False)
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for family in FAMILIES:
        family.add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (a check failed), 2 (bad input, one line on stderr), or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        top = parser()
        args, rest = top.parse_known_args(argv)
        if rest and not args.overrides:
            top.error(f"unrecognized arguments: {' '.join(rest)}")
        status: int = args.call(args, rest) if args.overrides else args.call(args)
        return status
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


if __name__ == "__main__":
    sys.exit(main())
