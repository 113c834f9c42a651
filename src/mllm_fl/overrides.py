"""Values of a configuration from the command line, typed: ``--federate.rounds 3 --data.alpha 0.1``. The one file that imports tyro."""

from __future__ import annotations

import contextlib
import io

from mllm_fl.config import Config
from mllm_fl.errors import UserError


def override(config: Config, args: list[str]) -> Config:
    """The configuration with ``--table.key VALUE`` words applied.

    Raises:
        UserError: unknown key, wrong type or out of range; or tyro is not installed.
    """
    try:
        import tyro
    except ImportError as e:
        raise UserError(
            "command line", "overriding values needs tyro", "pip install tyro, or put the values into the TOML file"
        ) from e
    if "--help-config" in args:
        tyro.cli(
            Config, default=config, args=["--help"], prog="mllm-fl VERB CONFIG", config=(tyro.conf.AvoidSubcommands,)
        )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(
                Config, default=config, args=args, config=(tyro.conf.AvoidSubcommands,), console_outputs=True
            )
    except SystemExit as e:
        words = [line.strip("│╭╮╰╯─| ") for line in said.getvalue().splitlines()]
        text = " ".join(w for w in words if w and not w.startswith("For full helptext"))
        raise UserError("command line", text or "unknown option", "`--help-config` lists all options") from e
