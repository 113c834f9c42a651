"""The engine's promises, with backends that do as they are told: caps, second askings, what is lost when (nothing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.annotate import engine
from mllm_fl.annotate.backends.base import Deliver, Request
from mllm_fl.annotate.engine import Limits, Meter, Question, ask, duration
from mllm_fl.annotate.ledger import Entry, Key, Ledger
from mllm_fl.annotate.prices import Price, image_tokens, price_of, request_tokens
from mllm_fl.annotate.prompts import INSTRUCT, Prompt
from mllm_fl.errors import UserError
from mllm_fl.events import Event

PLAIN, TALK = INSTRUCT["caption"], INSTRUCT["conversation"]
PRICE = Price(input=1e6, output=0)  # one a token


@dataclass
class Stream:
    """A streaming backend with ``window`` requests in flight; ``says`` answers the n-th."""

    says: Callable[[int, Request], Entry]
    window: int = 4
    model: str = "stub"
    batch_size: int = 8
    streams: bool = True
    seen: list[Request] = field(default_factory=list)

    def parameters(self) -> dict[str, Any]:
        return {}

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        waiting: list[tuple[int, Request]] = []
        source = enumerate(requests)
        while True:
            while len(waiting) < self.window and (taken := next(source, None)) is not None:
                waiting.append(taken)
                self.seen.append(taken[1])
            if not waiting:
                return
            at, request = waiting.pop(0)
            deliver([(at, self.says(len(self.seen), request))])


def questions(n: int, prompt: Prompt = PLAIN) -> list[Question]:
    return [
        Question(Key(f"{i:064x}", prompt.kind, prompt.version, "stub", "{}"), b"", prompt, ("q?",)) for i in range(n)
    ]


def fine(n: int, request: Request) -> Entry:
    return Entry(("A square.",), None, 1, 1, 0.1, requests=1)


def test_the_request_cap_is_met_and_the_next_run_goes_on(tmp_path: Path) -> None:
    backend = Stream(fine)
    with Ledger(tmp_path / "l") as ledger:
        out = ask(questions(30), ledger, backend, Limits(max_requests=10))
        assert out.stopped == "max_requests 10 (7 answered calls so far)"  # three more were in flight
        assert ledger.totals().requests == len(backend.seen) == 10
    with Ledger(tmp_path / "l") as ledger:  # the cap counts earlier runs, too
        assert ask(questions(30), ledger, backend, Limits(max_requests=10)).stopped is not None
        assert len(backend.seen) == 10
        assert ask(questions(30), ledger, backend).stopped is None
        assert ledger.totals().requests == len(backend.seen) == 30


@pytest.mark.parametrize(("window", "most"), [(1, 40), (4, 40), (16, 40 + 16 * 3)])
def test_the_spend_cap_stops_within_one_window(window: int, most: int, tmp_path: Path) -> None:
    """An answer costs 1, 2 or 3: what is spent stays below the cap, unless the first window alone passes it."""

    def says(n: int, request: Request) -> Entry:
        return Entry(("A square.",), None, n % 3 + 1, 0, 0.1, requests=1)

    with Ledger(tmp_path / "l") as ledger:
        out = ask(questions(200), ledger, Stream(says, window), Limits(max_cost=40.0, price=PRICE))
        spent = ledger.totals()
        assert out.stopped is not None
        assert 40 - 3 * (window + 1) <= spent.cost <= most
        assert spent.cost == spent.prompt_tokens


def test_a_spend_cap_without_prices_is_refused() -> None:
    with pytest.raises(UserError, match=r"annotate\.max_cost: needs prices"):
        Limits(max_cost=1.0)


def test_an_unusable_answer_is_asked_for_once_more_with_the_reason(tmp_path: Path) -> None:
    def says(n: int, request: Request) -> Entry:
        text = '{"turns": [{"question": "How many?", "answer": "Two."}]}' if request.fault else "Two squares."
        return Entry((text,), None, 5, 5, 0.1, requests=1)

    backend = Stream(says)
    with Ledger(tmp_path / "l") as ledger:
        out = ask(questions(3, TALK), ledger, backend, Limits(again=1))
        assert out.failed == {}
        assert [r.fault for r in backend.seen] == [""] * 3 + ["answer is not JSON"] * 3
        assert backend.seen[0].schema is not None
        (row,) = ledger.rows([questions(3, TALK)[0].key])
        assert (row["status"], row["attempts"], row["prompt_tokens"]) == ("ok", 2, 10)  # both were paid


def test_what_a_backend_could_not_do_is_not_asked_again_in_the_same_run(tmp_path: Path) -> None:
    backend = Stream(lambda n, r: Entry(error="HTTP 500"))
    with Ledger(tmp_path / "l") as ledger:
        out = ask(questions(3), ledger, backend, Limits(again=5))
        assert (len(backend.seen), set(out.failed.values())) == (3, {"HTTP 500"})
        assert ledger.totals().requests == 0


def test_first_answers_are_kept_when_a_later_one_fails(tmp_path: Path) -> None:
    """Two questions about one picture: the second fails, and the next run asks the second alone."""
    two = [Question(questions(1)[0].key, b"", PLAIN, ("one?", "two?"))]

    class Halting(Stream):
        def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
            for at, request in enumerate(requests):
                self.seen.append(request)
                if not request.done:
                    deliver([(at, Entry(("first",), None, 3, 1, 0.1, requests=1, partial=True))])
                    deliver([(at, Entry(("first",), "HTTP 500"))])
                else:
                    deliver([(at, Entry((*request.done, "second"), None, 3, 1, 0.1, requests=1))])

    backend = Halting(fine)
    with Ledger(tmp_path / "l") as ledger:
        assert ask(two, ledger, backend).failed == {two[0].key: "HTTP 500"}
        assert ledger.answers([two[0].key]) == {}
    with Ledger(tmp_path / "l") as ledger:
        ask(two, ledger, backend)
        assert ledger.answers([two[0].key]) == {two[0].key: ("first", "second")}
        assert ledger.totals().requests == 2
    assert [r.done for r in backend.seen] == [(), ("first",)]


def test_two_hundred_failures_in_a_row_end_it(tmp_path: Path) -> None:
    with (
        Ledger(tmp_path / "l") as ledger,
        pytest.raises(UserError, match="200 answers in a row failed, the last with: HTTP 500"),
    ):
        ask(questions(300), ledger, Stream(lambda n, r: Entry(error="HTTP 500")))


def test_progress_says_rate_cost_and_time_left(tmp_path: Path) -> None:
    seen: list[Event] = []
    with Ledger(tmp_path / "l") as ledger:
        ask(questions(5), ledger, Stream(fine), Limits(price=PRICE), seen.append)
    assert (seen[-1].done, seen[-1].total) == (5, 5)
    assert "cost 5" in seen[-1].note
    now = [0.0]
    meter = Meter(PRICE, lambda: now[0])
    for _ in range(11):
        meter.saw(Entry(("x",), cost=0.5, requests=2))
        now[0] += 0.25
    now[0] -= 0.25
    assert meter.note(left=1200, failed=3) == "4/s, cost 5.5, 3 failed, 5.0 min left"
    assert meter.calls(10) == 20
    assert [duration(s) for s in (5, 150, 7200, 400000)] == ["5 s", "2.5 min", "2.0 h", "4.6 d"]


def test_prices_come_from_the_users_table(tmp_path: Path) -> None:
    table = tmp_path / "prices.toml"
    table.write_text('["gpt-x"]\ninput = 2.0\noutput = 8.0\n')
    price = price_of(str(table), "gpt-x")
    assert price is not None
    assert price.cost(1_000_000, 500_000) == 6.0
    assert price.cost(1_000_000, 500_000, batch=True) == 3.0
    assert price_of(None, "gpt-x") is None
    with pytest.raises(UserError, match="has no price for 'other'; it names gpt-x"):
        price_of(str(table), "other")
    table.write_text('["gpt-x"]\ninput = -2.0\noutput = 8.0\n')
    with pytest.raises(UserError, match="negative"):
        price_of(str(table), "gpt-x")


def test_tokens_are_guessed_by_tiles_and_letters() -> None:
    assert image_tokens(512, 512) == 85 + 170
    assert image_tokens(1024, 512) == image_tokens(2048, 1024, max_side=1024) == 85 + 2 * 170
    assert request_tokens("abcd", ("abcdefgh", "ab"), 100) == (1 + 2 + 100 + 12) + (1 + 1 + 100 + 12)


def test_failures_in_a_row_are_counted_anew_after_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FAILING", 3)
    backend = Stream(lambda n, r: fine(n, r) if n % 3 == 0 else Entry(error="HTTP 500"), window=1)
    with Ledger(tmp_path / "l") as ledger:
        assert len(ask(questions(9), ledger, backend).failed) == 6  # two, an answer, two, an answer, ...
        with pytest.raises(UserError, match="3 answers in a row failed, the last with: HTTP 500"):
            ask(questions(40)[9:], ledger, Stream(lambda n, r: Entry(error="HTTP 500"), window=1))


def test_claims_are_renewed_while_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute passes with each answer: the claim of what still waits is as young as the last answer."""
    signs: list[float] = []
    monkeypatch.setattr(engine, "_RENEW", -1.0)
    with Ledger(tmp_path / "l") as ledger:
        monkeypatch.setattr(ledger, "renew", lambda: signs.append(0.0))
        ask(questions(5), ledger, Stream(fine))
    assert len(signs) == 5


def test_records_that_failed_without_a_call_do_not_make_the_others_cheaper() -> None:
    meter = Meter(None)
    for _ in range(3):
        meter.saw(Entry(error="no connection"))
    meter.saw(Entry(("x",), requests=1))
    assert meter.calls(8) == 8  # not two
    for _ in range(8):
        meter.saw(Entry(("x",), requests=3))
    assert meter.calls(8) == round(8 * 25 / 12)
