"""A ServerApp whose SuperLink has failed under it ends itself, so that the run can be resumed; Flower's own calls would hang for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.deployment.real import until

from mllm_fl.deployment.processes import command_of

pytest.importorskip("flwr")

GRID = """
import os, sys, threading, time
from mllm_fl.engines import flower

class Silent:
    "A SuperLink that takes a call and never answers it."
    def pull_messages(self, ids):
        threading.Event().wait()

class Answering:
    def pull_messages(self, ids):
        return []
"""


def script(text: str) -> list[str]:
    return [sys.executable, "-c", GRID + textwrap.dedent(text)]


def test_a_server_app_that_hangs_in_one_call_ends_itself() -> None:
    """Flower's ServerApp with ours in it, the five minutes shortened to one second."""
    assert flower_patience() == 300.0
    text = """
    flower.PATIENCE = 1.0
    from flwr.app import Context, RecordDict
    app = flower.server_app(lambda link, values, run: link.collect(["1"]))
    app(Silent(), Context(1, 1, {}, RecordDict(), {}))
    """
    done = subprocess.run(script(text), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (70, "")


def flower_patience() -> float:
    from mllm_fl.engines.flower import PATIENCE

    return PATIENCE


def test_one_that_is_answered_goes_on_however_long_the_run_takes() -> None:
    """Patience is for one call: a run of twice the patience, and idle time of once and a half, are no reason to end."""
    text = """
    link = flower.GridLink(Answering(), 3.0)
    begun = time.monotonic()
    while time.monotonic() - begun < 2.0:
        link.collect(["1"])
    time.sleep(4.5)
    link.collect(["1"])
    print("alive")
    """
    done = subprocess.run(script(text), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_one_whose_parent_was_killed_does_not_live_on(tmp_path: Path) -> None:
    """Flower's executor starts the ServerApp; with SIGKILL it goes without a word to it."""
    place = tmp_path / "child.py"
    place.write_text(
        GRID + "flower.GridLink(Silent(), 3600.0)\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(3600)\n"
    )
    number = tmp_path / "number"
    code = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    parent = subprocess.Popen([sys.executable, "-c", code, str(place), str(number)], start_new_session=True)
    try:
        child = int(until(lambda: number.exists() and number.read_text()))
        assert str(place) in command_of(child)
        os.kill(parent.pid, signal.SIGKILL)
        until(lambda: str(place) not in command_of(child), 600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
