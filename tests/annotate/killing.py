"""A process that annotates until it is killed; started from a server that has everything imported, so that ten of them cost little."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from mllm_fl.stages.annotate import AnnotateConfig, annotate


def work(config: AnnotateConfig, folder: str) -> None:
    """One ``mllm-fl annotate``; it exits with 0 when the corpus is finished."""
    annotate(config, Path(folder))
    sys.exit(0)


def context() -> Any:
    """Processes forked from one that has imported this module, and has no threads."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.annotate.killing", "openai", "mllm_fl.annotate.backends.openai"])
    return found
