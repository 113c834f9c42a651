"""How fast an endpoint is asked: a clock that the test turns, so nothing here waits."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from time import time

import pytest

from mllm_fl.annotate.backends.pace import Bucket, Pace, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sixty_a_minute_are_one_a_second() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    starts = []
    for _ in range(5):
        clock.now += bucket.wait()
        bucket.take(1)
        starts.append(clock.now)
    assert starts == pytest.approx([0, 1, 2, 3, 4])
    clock.now += 100  # idleness saves nothing up
    assert bucket.wait() == 0
    bucket.take(1)
    assert bucket.wait() == pytest.approx(0.9)


def test_tokens_are_paid_after_they_are_known() -> None:
    clock = Clock()
    bucket = Bucket(600, clock)  # ten a second
    bucket.take(30)
    assert bucket.wait() == pytest.approx(3)
    bucket.take(-10)  # it took twenty
    assert bucket.wait() == pytest.approx(2)
    assert Bucket(None, clock).wait() == 0


def test_a_refusal_halves_what_is_in_flight_once_per_window_and_successes_bring_it_back() -> None:
    clock = Clock()
    pace = Pace(16, clock=clock)
    clock.now = 1.0
    for _ in range(10):  # ten refusals of requests that began together
        pace.pushed_back(began=0.5, retry_after=None)
    assert pace.limit == 8
    clock.now = 2.0
    pace.pushed_back(began=1.5, retry_after=None)
    assert pace.limit == 4
    for _ in range(5):
        pace.succeeded()
    assert 5 <= pace.limit < 6
    for _ in range(1000):
        pace.succeeded()
    assert pace.limit == 16
    for _ in range(20):
        clock.now += 1
        pace.pushed_back(began=clock.now - 0.5, retry_after=None)
    assert pace.limit == 1


def test_nobody_enters_before_retry_after_and_never_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def story() -> None:
        pace = Pace(2, clock=clock)
        pace.pushed_back(began=0.0, retry_after=7.0)
        assert await pace.enter(1) == 7.0
        assert slept == [7.0]
        waiting = asyncio.create_task(pace.enter(1))
        await real(0)
        assert not waiting.done()  # one is inside, and the refusal left room for one
        await pace.leave(1)
        await waiting
        assert (pace.inside, pace.peak) == (1, 1)

    asyncio.run(story())


def test_the_longest_pause_counts_and_tokens_that_were_not_used_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, real = Clock(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def story() -> None:
        pace = Pace(2, tokens_per_minute=60, clock=clock)  # one a second
        pace.pushed_back(began=0.0, retry_after=9.0)
        pace.pushed_back(began=0.0, retry_after=2.0)  # another's shorter pause does not end the longer one
        assert await pace.enter(30) == 9.0
        await pace.leave(30, used=10)  # ten of the thirty, a tenth of a second's saved up
        assert await pace.enter(1) == pytest.approx(9.0 + 9.9)

    asyncio.run(story())


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "3"}) == 0.25
    assert retry_after({"retry-after": "-1"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None
    found = retry_after({"retry-after": formatdate(time() + 60, usegmt=True)})
    assert found is not None
    assert 50 < found <= 60
