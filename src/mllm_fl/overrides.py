"""Values of a configuration from the command line, typed: ``--federate.rounds 3 --data.alpha 0.1``. The one file that imports tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io

from mllm_fl.algorithms import find
from mllm_fl.config import Config
from mllm_fl.errors import UserError


def override(config: Config, args: list[str]) -> Config:
    """The configuration with ``--table.key VALUE`` words applied; another ``--federate.algorithm`` brings its own default fields.

    Raises:
        UserError: unknown key, wrong type or out of range; or tyro is not installed.
    """
    try:
        import tyro
    except ImportError as e:
        raise UserError(
            "command line", "overriding values needs tyro", "pip install tyro, or put the values into the TOML file"
        ) from e
    config, args = _algorithm(config, args)
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


def _algorithm(config: Config, args: list[str]) -> tuple[Config, list[str]]:
    """Take ``--federate.algorithm NAME`` out of the words: which fields a method has depends on it."""
    rest: list[str] = []
    words = iter(args)
    for word in words:
        key, equals, value = word.partition("=")
        if key != "--federate.algorithm":
            rest.append(word)
            continue
        name = value if equals else next(words, "")
        if name != config.federate.algorithm:
            method = find(name, "--federate.algorithm")()
            config = dataclasses.replace(
                config, federate=dataclasses.replace(config.federate, algorithm=name, method=method)
            )
    return config, rest
