"""The suite: one list of named checks, each a function from a row to None or to a sentence that says what is wrong."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mllm_fl.conformance import checks, formulas, state, wire
from mllm_fl.conformance.row import Row
from mllm_fl.conformance.toy import SIZE
from mllm_fl.errors import UserError

CHECKS: dict[str, Callable[[Row], str | None]] = {
    "declarations": checks.says_what_it_is,
    "neutral": checks.neutral_is_fedavg,
    "differs": checks.differs_from_fedavg,
    "arrival": checks.order_of_arrival,
    "one-client": checks.one_client,
    "odd-clients": checks.odd_clients,
    "identical-clients": checks.identical_clients,
    "vanishing-client": checks.vanishing_client,
    "rejected-update": checks.rejected_update,
    "no-gradient": checks.unreached_parameters,
    "shapes": checks.shapes_are_kept,
    "net": checks.net_is_structure,
    "interruption": state.interruption,
    "client-memory": state.memory_is_returned,
    "server-state": state.server_state_is_kept,
    "buffers": state.buffers_are_averaged,
    "batch-norm": state.batch_norm_policies,
    "arguments": state.arguments_unchanged,
    "self": state.nothing_on_self,
    "global-state": state.no_global_state,
    "global-random": state.no_global_random,
    "post-hoc": state.post_hoc,
    "bytes": wire.bytes_as_declared,
    "form": wire.form_as_declared,
    "precision": wire.precisions,
    "two-classes": wire.two_classes,
    "thousand-classes": wire.a_thousand_classes,
    "test-images": wire.no_test_image,
    "smooth": formulas.smooth_at_the_start,
    "direction": formulas.teacher_comes_first,
    "declared-term": formulas.as_declared,
}
"""What is checked, by the name under which it is printed, chosen and waived."""


class Verdict(NamedTuple):
    """What one check found: ``sentence`` is empty where it holds, and the reason where it was waived."""

    check: str
    status: Literal["ok", "fails", "waived"]
    sentence: str
    seconds: float


class _TooLong(BaseException):
    """The alarm's own: no ``except Exception`` of a hook catches it."""


@contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """Raise after ``seconds``; only where a process has alarms, and in its main thread."""
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not able:
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(row: Row, check: str, limit: float | None = None) -> Verdict:
    """One check on one row, stopped after ``limit`` seconds; an exception in a hook is a finding like any other.

    Raises:
        UserError: no such check.
    """
    if check not in CHECKS:
        raise UserError("check-method", f"no check {check!r}", f"known: {', '.join(CHECKS)}")
    if check in row.waives:
        return Verdict(check, "waived", row.waives[check], 0.0)
    start = time.perf_counter()
    try:
        with _within(limit), torch.random.fork_rng(devices=[]):  # what a hook does to the global generator ends here
            said = CHECKS[check](row)
    except _TooLong:
        said = (
            f"not done after {limit:.0f} seconds on images of {SIZE} x {SIZE} pixels: give the class a"
            " trial = {field: value} under which it is quick"
        )
    except Exception as e:
        said = f"{type(e).__name__}{_where(e, row)}: {' '.join(str(e).split())}"
    return Verdict(check, "fails" if said else "ok", said or "", time.perf_counter() - start)


def run(row: Row, names: Iterable[str] | None = None, limit: float | None = None) -> Iterator[Verdict]:
    """The verdicts, one after another, in the order of :data:`CHECKS`.

    Raises:
        UserError: the row waives a check that does not exist.
    """
    for name in row.waives:
        if name not in CHECKS:
            raise UserError("check-method", f"waives {name!r}, which is no check", f"known: {', '.join(CHECKS)}")
    for name in names or CHECKS:
        yield judge(row, name, limit)


def _where(e: BaseException, row: Row) -> str:
    """`` in server (my_module.py:41)``: the innermost line of the method's own file, if any."""
    own = getattr(sys.modules.get(row.method.__module__), "__file__", None)
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == own]
    return f" in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
