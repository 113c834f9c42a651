"""Stage 1a against a real server, `transformers serve` on a tiny saved LLaVA, through a proxy that does what networks and services do."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.annotate.killing import context, work
from tests.annotate.serving import Proxy, proxied, seen, serve, talkative

from mllm_fl.annotate.ledger import Ledger
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import AnnotateConfig, annotate

for package in ("openai", "fastapi", "uvicorn", "accelerate"):
    pytest.importorskip(package, reason="pip install 'mllm-fl[dev]'")

Upstream = tuple[str, str]  # address, name of the model


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    folder = tmp_path_factory.mktemp("served")
    model = talkative(folder / "llava")
    with serve(model, folder / "log") as url:
        yield url, str(model)


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[Proxy]:
    with proxied(upstream[0]) as found:
        yield found


def config(proxy: Proxy, upstream: Upstream, **changes: object) -> AnnotateConfig:
    made = AnnotateConfig(
        images=12, kinds=("caption", "detail"), backend="openai", model=upstream[1], base_url=proxy.url, max_tokens=24, concurrency=4,
        first_pause=0.05, retries=8, timeout=60.0,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def rows(folder: Path) -> Counter[str]:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return Counter(dict(db.execute("SELECT status, count(*) FROM answers GROUP BY status")))


def answered(folder: Path) -> set[str]:
    """What the proxy saw of the questions that have an answer in the ledger."""
    if not (folder / "ledger.sqlite").exists():
        return set()
    pictures = {row["sha256"]: folder / row["image"] for row in map(json.loads, (folder / "pictures.jsonl").open())}
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        found = db.execute("SELECT image, parameters FROM answers WHERE status = 'ok'").fetchall()
    return {seen(pictures[image].read_bytes(), json.loads(words)["questions"][0]) for image, words in found}


def test_faults_of_every_kind_cost_nothing_but_time(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    """Busy, failing, cut and garbled replies are asked again; a text that was cut off is a failure, and is no answer."""
    proxy.faults = {
        2: "429",
        3: "429 0.1",
        6: "500",
        8: "cut",
        11: "invalid",
        13: "503 0.1",
        15: "length",
        18: "French",
    }
    corpus = annotate(config(proxy, upstream), tmp_path)
    assert corpus.card["failures"] == {"answer cut off at max_tokens": 1}
    assert rows(tmp_path) == {"ok": 23, "failed": 1}
    assert len(proxy.asked) == 24 + 6  # 2, 3, 6, 8, 11 and 13 once more
    assert max(Counter(proxy.answered).values()) == 1  # no whole reply was asked for twice
    assert 1 <= proxy.most <= 4
    assert sum(r.answers == ("La lettre est noire.",) for r in corpus.records) == 1  # for the language check to find
    assert corpus.card["bill"]["requests"] == 24
    again = annotate(config(proxy, upstream), tmp_path, retry=True)
    assert (len(again.records), len(proxy.asked)) == (24, 31)


def test_a_reply_that_comes_too_late_is_asked_for_again(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    proxy.faults = {1: "slow 15"}
    slow = config(proxy, upstream, images=1, kinds=("caption",), timeout=6.0, retries=8)
    assert len(annotate(slow, tmp_path).records) == 1
    assert len(proxy.asked) >= 2


def test_a_server_that_ignores_the_schema_is_caught_here(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    """`transformers serve` takes response_format and pays it no heed: a tiny model's words are no conversation."""
    with pytest.raises(
        UserError, match="not one of 2 annotations succeeded; the first failed with: answer is not JSON"
    ):
        annotate(config(proxy, upstream, images=2, kinds=("conversation",)), tmp_path)
    assert len(proxy.asked) == 4  # each was asked once more, with the reason


def test_a_model_that_the_server_does_not_have_is_one_line(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refuses the model: .*requested 'gpt-9'.*check annotate\.model"):
        annotate(config(proxy, upstream, model="gpt-9"), tmp_path)


def test_killed_at_ten_points_nothing_is_lost_and_only_what_was_in_flight_is_asked_again(
    proxy: Proxy, upstream: Upstream, tmp_path: Path
) -> None:
    """SIGKILL when a request comes in, or when its reply has gone out, ten times over on one corpus."""
    wanted = config(proxy, upstream)
    ledger = tmp_path / "ledger.sqlite"
    for k in range(10):
        process = context().Process(target=work, args=(wanted, str(tmp_path)))
        before, known = len(proxy.asked), answered(tmp_path)
        stage = ("came", "went")[k % 2]

        def kill(now: str, number: int, point: int = before + 2 + k // 3, wanted: str = stage) -> None:
            if now == wanted and number >= point and process.is_alive():  # noqa: B023
                process.kill()  # noqa: B023

        proxy.on = kill
        process.start()
        process.join()
        assert process.exitcode == -9
        while proxy.inside:  # the server finishes what nobody waits for any more
            time.sleep(0.01)
        assert known <= answered(tmp_path)  # no row is lost
        asked = proxy.asked[before:]
        assert not known & set(asked)  # what was answered is not asked again
        assert len(set(asked) & set(proxy.asked[:before])) <= 4  # only what was in flight when the last one died
    proxy.on = lambda stage, number: None
    corpus = annotate(wanted, tmp_path)
    assert len(corpus.records) == 24
    times = Counter(proxy.asked)
    assert len(times) == 24
    assert len(proxy.asked) <= 24 + 10 * wanted.concurrency
    with Ledger(ledger) as ledger_now:
        assert (
            ledger_now.totals().requests == 24
        )  # as many as were written: each question has one paid answer on the books
    with sqlite3.connect(ledger) as db:
        assert db.execute("SELECT max(attempts) FROM answers").fetchone() == (1,)
