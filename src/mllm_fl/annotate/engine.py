"""The loop that gets questions answered: claim in the ledger, ask the backend, check what comes, write it down, keep to the caps.

What is answered is never asked again; what fails is asked again in the same run at most ``Limits.again`` times, with the reason told
to the model, and once more by the next run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from mllm_fl.annotate.backends.base import Backend, Request
from mllm_fl.annotate.ledger import Entry, Key, Ledger
from mllm_fl.annotate.prices import Price
from mllm_fl.annotate.prompts import Prompt
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent

T = TypeVar("T")
FAILING = 200  # failures in a row after which nothing more is asked
_RENEW = 60.0  # seconds between two signs of life
_WINDOW = 30.0  # seconds over which the rate is taken


class Question(NamedTuple):
    """One row to be: what is asked (``asked``, the wording of ``prompt``) about the encoded picture ``image``."""

    key: Key
    image: bytes | Path
    prompt: Prompt
    asked: tuple[str, ...]
    source: str = ""
    licence: str = ""

    def request(self, done: tuple[str, ...] = (), fault: str = "") -> Request:
        """What the backend is given."""
        return Request(self.image, self.asked, self.prompt.system, self.prompt.schema, done, fault)

    def fault(self, texts: Sequence[str]) -> str | None:
        """Why these answers make no record; None when they do."""
        try:
            self.prompt.record("x", "x.png", self.asked, texts)
        except ValueError as e:
            return str(e)
        return None


@dataclass(frozen=True)
class Limits:
    """Caps on the whole ledger, all runs and processes together: ``max_cost`` in the currency of ``price``, ``max_requests`` calls.

    ``again``: how often an unusable answer is asked for once more in one run.
    """

    max_cost: float | None = None
    max_requests: int | None = None
    price: Price | None = None
    again: int = 0

    def __post_init__(self) -> None:
        if self.max_cost is not None and self.price is None:
            raise UserError(
                "annotate.max_cost", "needs prices", 'give annotate.prices = "FILE" with the model\'s price'
            )


@dataclass
class Outcome:
    """``failed``: the questions without a usable answer, with the reason. ``stopped``: which cap ended the work, or None.

    ``waiting``: how many batches are still at work.
    """

    failed: dict[Key, str] = field(default_factory=dict)
    stopped: str | None = None
    waiting: int = 0


class Pending(UserError):
    """Everything is handed in, and the answers are not there yet."""


def ask(
    questions: Sequence[Question],
    ledger: Ledger,
    backend: Backend,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Ask until every question is answered or has failed, or a cap is reached; waits for what other processes hold.

    Raises:
        UserError: nothing can be answered (endpoint down, wrong key), the ledger cannot be written, or 200 answers in a row failed.
    """
    return _Work(questions, ledger, backend, limits or Limits(), progress).run()


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, ``size`` at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


class _Work:
    def __init__(
        self, questions: Sequence[Question], ledger: Ledger, backend: Backend, limits: Limits, progress: Progress
    ) -> None:
        self.questions = {q.key: q for q in questions}
        self.keys = list(self.questions)
        self.ledger, self.backend, self.limits, self.progress = ledger, backend, limits, progress
        self.out = Outcome()
        self.tries: dict[Key, int] = {}
        self.meter = Meter(limits.price)
        self.taken: list[Key] = []  # in flight and done, by the position under which the backend knows them
        self.streams = getattr(backend, "streams", False)
        self.inside, self.claimed, self.in_a_row = 0, 0, 0
        self.renewed, self.shown = time.monotonic(), 0.0

    def run(self) -> Outcome:
        self.meter.there = sum(1 for _ in self.ledger.answered(self.keys))
        self._show()
        left = self.keys
        while left and self.out.stopped is None:
            self.claimed = 0
            if self.streams:
                self._pass(self._requests(left))
            else:
                for part in chunks(left, self.backend.batch_size):
                    if requests := list(self._requests(part)):
                        self._pass(requests)
            there = set(self.ledger.answered(left))
            left = [k for k in left if k not in there and (k not in self.out.failed or self._again(k))]
            if left and not self.claimed and self.out.stopped is None:  # the rest is in another process's hands
                time.sleep(0.2)
        self.meter.there = sum(1 for _ in self.ledger.answered(self.keys))
        self.ledger.sync()
        self._show(final=True)
        return self.out

    def _again(self, key: Key) -> bool:
        """Whether an answer that made no record is asked for once more in this run."""
        return 0 < self.tries.get(key, 0) <= self.limits.again

    def _pass(self, requests: Iterable[Request]) -> None:
        self.backend.answer(requests, self._deliver)
        self.taken, self.inside = [], 0

    def _requests(self, keys: Sequence[Key]) -> Iterator[Request]:
        """Claimed questions, one after another, as long as the caps allow; claims are taken a batch at a time."""
        for part in chunks(keys, self.backend.batch_size):
            mine = self.ledger.claim([k for k in part if k not in self.out.failed or self._again(k)])
            self.claimed += len(mine)
            done = self.ledger.partial(mine)
            for key in mine:
                self._check_caps()
                if self.out.stopped is not None:
                    return
                self.taken.append(key)
                self.inside += 1
                yield self.questions[key].request(done.get(key, ()), self.out.failed.get(key, ""))

    def _check_caps(self) -> None:
        caps = self.limits
        if caps.max_cost is None and caps.max_requests is None:
            return
        spent = self.ledger.totals()
        if caps.max_requests is not None:
            calls = self.meter.calls(self.inside + 1)
            if spent.requests + calls > caps.max_requests:
                self.out.stopped = f"max_requests {caps.max_requests:,} ({spent.requests:,} answered calls so far)"
        if caps.max_cost is not None and spent.cost + self.meter.expected(self.inside + 1) > caps.max_cost:
            self.out.stopped = f"max_cost {caps.max_cost:g} ({spent.cost:.4g} spent so far)"

    def _deliver(self, answers: list[tuple[int, Entry]]) -> None:
        rows: list[tuple[Key, Entry]] = []
        for at, raw in answers:
            key = self.taken[at]
            question = self.questions[key]
            entry = replace(raw, source=question.source, licence=question.licence)
            if entry.cost is None and self.limits.price is not None:
                price = self.limits.price.cost(entry.prompt_tokens, entry.completion_tokens)
                entry = replace(entry, cost=price)
            if entry.error is None and not entry.partial and (fault := question.fault(entry.texts)):
                provenance = {**entry.provenance, "unusable": json.dumps(entry.texts, ensure_ascii=False)[:2000]}
                entry = replace(entry, texts=(), error=fault, provenance=provenance)
                self.tries[key] = self.tries.get(key, 0) + 1
            rows.append((key, entry))
        self.ledger.write(rows)
        for key, entry in rows:
            self._count(key, entry)
        now = time.monotonic()
        if now - self.renewed > _RENEW:
            self.renewed = now
            self.ledger.renew()
            self.ledger.sync()
        self._show()
        if self.in_a_row >= FAILING:
            last = next(reversed(self.out.failed.values()))
            raise UserError(
                self.ledger.path,
                f"{self.in_a_row} answers in a row failed, the last with: {last}",
                "mend the cause and run the same command; what was answered is kept",
            )

    def _count(self, key: Key, entry: Entry) -> None:
        self.meter.saw(entry)
        if entry.partial:
            return
        self.inside -= 1
        if entry.error is not None:
            self.out.failed[key] = entry.error
            self.in_a_row += 1
        else:
            self.out.failed.pop(key, None)
            self.in_a_row = 0
            self.meter.there += 1

    def _show(self, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self.shown >= 0.1:
            self.shown = now
            total, failed = len(self.keys), len(self.out.failed)
            done = min(self.meter.there + failed, total)
            self.progress(Event("annotate", done, total, self.meter.note(total - done, failed)))


class Meter:
    """Counts this run: rate over the last half minute, cost so far, time left, and what a record takes on the average."""

    def __init__(self, price: Price | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.there = 0  # answered, also by others and before
        self._price, self._clock = price, clock
        self._times: list[float] = []
        self._records, self._calls, self._cost = 0, 0, 0.0
        self._dearest = 0.0

    def saw(self, entry: Entry) -> None:
        """One delivery of the backend."""
        self._calls += entry.requests
        self._cost += entry.cost or 0.0
        self._dearest = max(self._dearest, entry.cost or 0.0)
        if not entry.partial:
            self._records += 1
            self._times.append(self._clock())
            if len(self._times) > 4096 or self._times[-1] - self._times[0] > 2 * _WINDOW:
                self._times = [t for t in self._times if t > self._times[-1] - _WINDOW][-2048:]

    def calls(self, records: int) -> int:
        """How many calls so many records are likely to take."""
        mean = self._calls / self._records if self._records and self._calls else 1.0
        return round(records * max(mean, 1.0))

    def expected(self, records: int) -> float:
        """What so many records are likely to cost, judged by the dearest so far: the cap is met from below. 0 before the first."""
        return records * self._dearest

    def rate(self) -> float | None:
        """Records a second over the last half minute; None before two of them."""
        recent = [t for t in self._times if t > self._clock() - _WINDOW]
        if len(recent) < 2 or recent[-1] == recent[0]:
            return None
        return (len(recent) - 1) / (recent[-1] - recent[0])

    def note(self, left: int, failed: int) -> str:
        """What the progress line says."""
        words = []
        if (rate := self.rate()) is not None:
            words.append(f"{rate:.3g}/s")
        if self._price is not None:
            words.append(f"cost {self._cost:.4g}")
        if failed:
            words.append(f"{failed} failed")
        if rate and left:
            words.append(f"{duration(left / rate)} left")
        return ", ".join(words)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
