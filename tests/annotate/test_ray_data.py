"""The annotator inside Ray Data's actors: what goes in and comes out of one, and where Ray is installed, a corpus through two of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mllm_fl.annotate.backends import ray_data
from mllm_fl.annotate.backends.base import Deliver, Request
from mllm_fl.annotate.backends.ray_data import STOP, Actor, RayBackend, request_of, row_of
from mllm_fl.annotate.ledger import Entry, Ledger
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import make_backend
from mllm_fl.stages.annotate_config import AnnotateConfig


class Says:
    """Answers the first question alone, then all, each with a bill; ends at a picture called ``stop``."""

    model, batch_size = "says", 2

    def parameters(self) -> dict[str, Any]:
        return {}

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        for i, r in enumerate(requests):
            if r.image == b"stop":
                raise UserError("endpoint", "is down: really", "start it")
            deliver([(i, Entry(("one",), prompt_tokens=3, requests=1, partial=True))])
            deliver([(i, Entry(("one", bytes(r.image).decode()), prompt_tokens=4, requests=1))])  # type: ignore[arg-type]


def asked(*images: bytes) -> pa.Table:
    return pa.Table.from_pylist([row_of(7 + i, Request(image, ("a?", "b?"))) for i, image in enumerate(images)])


def test_a_request_travels_whole(tmp_path: Path) -> None:
    there = Request(tmp_path / "x.png", ("a?", "b?"), "be brief", {"type": "object"}, ("yes",), "no JSON")
    sent = Request(b"\x00png", ("c?",))
    table = pa.Table.from_pylist([row_of(0, there), row_of(1, sent)])
    assert [request_of(r) for r in table.to_pylist()] == [there, sent]
    assert [r["at"] for r in table.to_pylist()] == [0, 1]


def test_an_actor_returns_every_delivery_with_its_own_bill_at_the_position_of_the_request() -> None:
    out = Actor(Says)(asked(b"x", b"y")).to_pylist()
    assert [r["at"] for r in out] == [7, 7, 8, 8]
    assert [json.loads(r["said"])["prompt_tokens"] for r in out] == [3, 4, 3, 4]
    assert json.loads(out[3]["said"])["texts"] == ["one", "y"]


def test_what_ends_the_work_comes_back_as_its_line_after_what_was_answered() -> None:
    out = Actor(Says)(asked(b"x", b"stop", b"y")).to_pylist()
    assert [r["at"] for r in out] == [7, 7, STOP]
    assert out[-1]["said"] == "endpoint: is down: really; start it"


def test_an_actor_whose_backend_cannot_be_made_says_so_when_it_is_asked() -> None:
    def make() -> Says:
        raise UserError("annotate.backend", "no such folder")

    assert Actor(make)(asked(b"x")).to_pylist() == [{"at": STOP, "said": "annotate.backend: no such folder"}]


class Pipeline:
    """In the place of ``ray.data``: one actor, in this process, a batch a block, the last batch first."""

    def from_items(self, rows: list[dict[str, Any]], override_num_blocks: int) -> Pipeline:
        self.rows, self.blocks = rows, override_num_blocks
        return self

    def map_batches(self, actor: Any, *, fn_constructor_args: tuple[Any, ...], batch_size: int, **how: Any) -> Pipeline:
        self.actor, self.size, self.how = actor(*fn_constructor_args), batch_size, how
        return self

    def iter_batches(self, **_: Any) -> Iterable[pa.Table]:
        parts = [self.rows[i : i + self.size] for i in range(0, len(self.rows), self.size)]
        assert len(parts) == self.blocks
        return (self.actor(pa.Table.from_pylist(p)) for p in reversed(parts))

    def ActorPoolStrategy(self, size: int) -> int:  # noqa: N802 - Ray's name
        return size


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    found = Pipeline()
    monkeypatch.setattr(ray_data, "lost", lambda: ConnectionError)
    monkeypatch.setattr(ray_data, "installed", lambda: True)
    monkeypatch.setattr(ray_data, "_data", lambda actors: found)
    return found


def test_batches_are_delivered_as_they_come_under_their_own_positions(pipeline: Pipeline) -> None:
    got: list[list[tuple[int, Entry]]] = []
    backend = RayBackend(Says, "says", {}, 2, 3, 0.5)
    backend.answer([Request(x, ("a?", "b?")) for x in (b"0", b"1", b"2")], got.append)
    assert [[(at, e.texts[-1], e.partial) for at, e in part] for part in got] == [
        [(2, "one", True), (2, "2", False)],
        [(0, "one", True), (0, "0", False), (1, "one", True), (1, "1", False)],
    ]
    assert (pipeline.how["compute"], pipeline.how["num_gpus"]) == (3, 0.5)


def test_an_actors_refusal_is_the_commands_after_its_answers_are_delivered(pipeline: Pipeline) -> None:
    got: list[int] = []
    with pytest.raises(UserError, match=r"^endpoint: is down: really; start it$"):
        RayBackend(Says, "says", {}, 2, 1).answer(
            [Request(x, ("a?", "b?")) for x in (b"0", b"1", b"2", b"stop")],
            lambda found: got.extend(a for a, _ in found),
        )
    assert got == [2, 2]  # the batch of the refusal; the other was not asked for


def test_a_ray_that_gives_up_is_one_line(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Iterable[pa.Table]:
        raise ConnectionError("a page of traceback\nWorker died.\n")

    monkeypatch.setattr(pipeline, "iter_batches", broken)
    with pytest.raises(UserError, match=r"^annotate.actors: Ray gave up \(Worker died.\); what was answered is kept"):
        RayBackend(Says, "says", {}, 2, 1).answer([Request(b"0", ("a?",))], lambda _: None)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "installed", lambda: False)
    with pytest.raises(UserError, match=r"^annotate.actors: Ray is not installed; pip install 'mllm-fl\[ray\]'"):
        make_backend(AnnotateConfig(actors=2))


def test_each_actor_gets_its_share_of_the_rates_and_no_actors_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_data, "installed", lambda: True)
    config = AnnotateConfig(
        backend="openai", model="m", base_url="http://127.0.0.1:1/v1", actors=4, requests_per_minute=100, concurrency=8
    )
    backend = make_backend(config)
    assert isinstance(backend, RayBackend)
    one = backend._make()
    assert (one.model, backend.model, backend.parameters()) == ("m", "m", one.parameters())
    assert getattr(one, "requests_per_minute") == 25  # noqa: B009 - of the class inside
    assert getattr(make_backend(AnnotateConfig(actors=2)), "model").startswith("mini-llava ")  # noqa: B009
    with pytest.raises(UserError, match="is not on this machine"):
        make_backend(AnnotateConfig(backend="nobody/nothing", actors=2))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'mllm-fl[ray]'")
@pytest.mark.deploy
def test_real_ray_annotates_resumes_and_stops_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllm_fl.stages.annotate import annotate

    ray = importlib.import_module("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = AnnotateConfig(images=24, kinds=("caption",), batch_size=4, actors=2, max_tokens=32)
    try:
        capped = AnnotateConfig(images=24, kinds=("caption",), batch_size=4, actors=2, max_tokens=32, max_requests=8)
        with pytest.raises(UserError, match=r"stopped at max_requests 8 .*: 8 of 24"):
            annotate(capped, tmp_path / "ray")
        corpus = annotate(config, tmp_path / "ray")
    finally:
        ray.shutdown()
    plain = annotate(AnnotateConfig(images=24, kinds=("caption",), batch_size=4, max_tokens=32), tmp_path / "plain")
    assert [r.to_json() for r in corpus.records] == [r.to_json() for r in plain.records]
    with Ledger(tmp_path / "ray" / "ledger.sqlite") as ledger:
        assert ledger.totals().requests == 24  # none twice
