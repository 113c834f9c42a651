"""How fast an endpoint is asked: requests and tokens per minute, its own Retry-After, and as many at a time as it bears.

The number in flight follows the rule of TCP (additive increase, multiplicative decrease; Chiu & Jain 1989): a refusal halves it, once per
window; every full window of successes adds one, up to the configured number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime


class Bucket:
    """So many units per minute, evenly; what a tenth of a second brings may be saved up. None: no limit."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._clock, self._level, self._then = clock, 0.0, clock()

    def wait(self) -> float:
        """Seconds until something may be taken; 0 if now."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._level = min(0.1 * self._rate, self._level + (now - self._then) * self._rate)
        self._then = now
        return -self._level / self._rate if self._level < 0 else 0.0

    def take(self, amount: float) -> None:
        """Take it, into debt: the next one waits until the debt is paid."""
        if self._rate is not None:
            self._level -= amount


class Pace:
    """The gate that every request passes. One per event loop."""

    def __init__(
        self,
        most: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.limit, self.inside, self.peak = most, float(most), 0, 0
        self._clock = clock
        self._requests, self._tokens = Bucket(requests_per_minute, clock), Bucket(tokens_per_minute, clock)
        self._until = 0.0  # nobody starts before
        self._cut = -1.0  # when the number in flight was last halved
        self._freed = asyncio.Condition()

    async def enter(self, tokens: float) -> float:
        """Wait for a turn for a request of about so many tokens; returns when it began. Call :meth:`leave` afterwards."""
        while True:
            async with self._freed:
                await self._freed.wait_for(lambda: self.inside < max(1, int(self.limit)))
                now = self._clock()
                wait = max(self._until - now, self._requests.wait(), self._tokens.wait())
                if wait <= 0:
                    self.inside += 1
                    self.peak = max(self.peak, self.inside)
                    self._requests.take(1)
                    self._tokens.take(tokens)
                    return now
            await asyncio.sleep(wait)

    async def leave(self, guessed: float, used: float | None = None) -> None:
        """The request is over; ``used`` tokens replace the guess."""
        if used is not None:
            self._tokens.take(used - guessed)
        async with self._freed:
            self.inside -= 1
            self._freed.notify_all()

    def succeeded(self) -> None:
        """An answer came."""
        self.limit = min(float(self.most), self.limit + 1 / max(self.limit, 1.0))

    def pushed_back(self, began: float, retry_after: float | None) -> None:
        """The server is busy. ``began``: when that request began; refusals of one window count once."""
        if began > self._cut:
            self.limit = max(1.0, self.limit / 2)
            self._cut = self._clock()
        if retry_after is not None:
            self._until = max(self._until, self._clock() + retry_after)


def retry_after(headers: object) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as a date; None without either."""
    get = getattr(headers, "get", lambda _: None)
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, TypeError):
            continue
    return None
