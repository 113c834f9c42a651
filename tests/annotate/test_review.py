"""Decisions lie on the disk at once, the error rate is Wilson's, Label Studio's JSON goes out and comes back, and the page's server is for this machine alone."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.annotate.corpora import HOSTILE, corpus, record

from mllm_fl.annotate import review, review_labelstudio
from mllm_fl.annotate.hallucination import wilson
from mllm_fl.annotate.records import load
from mllm_fl.annotate.review import Review
from mllm_fl.annotate.review_server import ReviewServer
from mllm_fl.errors import UserError

RECORDS = [record(f"r{n}", f"images/{n % 4}.png", "A dog.", "It is brown.", kind="conversation") for n in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return corpus(tmp_path / "c", RECORDS)


def test_decisions_are_there_for_the_next_who_opens(folder: Path) -> None:
    first = Review(folder, RECORDS, 5)
    ids = [r.id for r in first.sample]
    first.decide(ids[0], "keep")
    first.decide(ids[1], "relabel", ["A cat.", "It is grey."])
    first.decide(ids[2], "drop")
    again = Review(folder, RECORDS, 5)
    assert [r.id for r in again.sample] == ids and {i: d.decision for i, d in again.decisions.items()} == dict(
        zip(ids, ("keep", "relabel", "drop"))
    )
    again.decide(ids[2], "")
    assert set(review.read(folder)) == set(ids[:2])
    assert review.applied(again.by_id[ids[1]], again.decisions[ids[1]]).answers == ("A cat.", "It is grey.")


def test_the_estimate_is_wilsons_over_the_sample_alone(folder: Path) -> None:
    r = Review(folder, RECORDS, 6)
    assert r.estimate().rate is None and "nothing decided yet of a sample of 6 from 12" in r.estimate().text()
    for n, one in enumerate(r.sample[:4]):
        r.decide(one.id, "drop" if n == 0 else "keep")
    outside = next(x.id for x in RECORDS if x not in r.sample)
    r.decide(outside, "drop")  # looked at by hand, not drawn: says nothing about the rate
    found = review.estimate(folder)
    assert found is not None and (found.errors, found.decided, found.sample, found.of) == (1, 4, 6, 12)
    assert (found.low, found.high) == wilson(1, 4)
    assert found.text().startswith("error rate 25.0 % (1 of 4 records), 95 % interval 4.6 to 69.9 % (Wilson)")


def test_what_makes_no_valid_record_is_refused_and_changes_nothing(folder: Path) -> None:
    r = Review(folder, RECORDS, 5)
    for id, decision, answers, says in (
        ("r1", "relabel", ["one"], "has 2 answers, not 1"), ("r1", "relabel", ["a", " "], "has an empty answer"), ("r1", "relabel", ["a", "<image>"], "contains <image>"),
        ("r1", "maybe", [], "is no decision"), ("nobody", "keep", [], "is not in this corpus"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            r.decide(id, decision, answers)
    assert not (folder / "review.jsonl").exists() and r.decisions == {}


def test_a_write_that_fails_leaves_the_decisions_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = Review(folder, RECORDS, 5)
    r.decide("r1", "keep")
    before = (folder / "review.jsonl").read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise UserError(path, "cannot be written (No space left on device)")

    monkeypatch.setattr("mllm_fl.annotate.review.write_whole", full)
    with pytest.raises(UserError, match="No space left"):
        r.decide("r2", "drop")
    assert (folder / "review.jsonl").read_bytes() == before and set(r.decisions) == {"r1"}


def test_label_studio_round_trip(folder: Path, tmp_path: Path) -> None:
    r = Review(folder, RECORDS, 5)
    a, b, c, d, _ = (x.id for x in r.sample)
    r.decide(a, "keep", by="ann")
    r.decide(b, "drop")
    r.decide(c, "relabel", [HOSTILE[0], "Ünïcode 犬"])
    review_labelstudio.export(folder, r.sample, r.decisions, tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [t["data"]["record"] for t in tasks] == [x.id for x in r.sample] and tasks[0]["data"]["image"].startswith(
        "data:image/png;base64,"
    )
    assert [len(t["annotations"]) for t in tasks] == [1, 1, 1, 0, 0]
    assert "<View>" in (tmp_path / "tasks.xml").read_text()
    back = review_labelstudio.read(tmp_path / "tasks.json", RECORDS)
    assert {i: (x.decision, x.answers, x.by, x.at) for i, x in back.items()} == {
        i: (x.decision, x.answers, x.by, x.at) for i, x in r.decisions.items()
    }
    tasks[3]["annotations"] = [
        {"result": [{"from_name": "decision", "to_name": "picture", "type": "choices", "value": {"choices": ["keep"]}}], "was_cancelled": False, "completed_by": 7},
        {"result": [{"from_name": "decision", "to_name": "picture", "type": "choices", "value": {"choices": ["drop"]}}], "was_cancelled": True},
    ]  # fmt: skip
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    assert (
        review_labelstudio.read(tmp_path / "done.json", RECORDS)[d].decision == "keep"
    )  # the cancelled one does not count


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[0]["data"].update(record="nobody"), "record 'nobody' is not in this corpus"),
        (lambda t: t[0].pop("annotations"), "lacks data.record or annotations"),
        (lambda t: t[0]["annotations"][0]["result"][1]["value"].update(text=["one"]), "does not fit the record's 2"),
        (lambda t: t[0]["annotations"][0]["result"][0]["value"].pop("choices"), "is not of our labelling interface"),
    ],
)
def test_another_export_is_one_line(folder: Path, tmp_path: Path, change: Any, says: str) -> None:
    r = Review(folder, RECORDS, 1)
    r.decide(r.sample[0].id, "relabel", ["a", "b"])
    tasks = review_labelstudio.tasks(folder, r.sample, r.decisions)
    change(tasks)
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=says):
        review_labelstudio.read(tmp_path / "t.json", RECORDS)


@pytest.fixture
def server(folder: Path) -> Iterator[ReviewServer]:
    with ReviewServer(Review(folder, RECORDS, 5)) as found:
        yield found


def call(
    server: ReviewServer, path: str, body: Any = None, token: str | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.host, timeout=30)
    sent = None if body is None else json.dumps(body) if not isinstance(body, str) else body
    kind = {} if sent is None else {"Content-Type": "application/json"}
    connection.request(
        "GET" if body is None else "POST",
        f"/{server.token if token is None else token}/{path}",
        sent,
        {**kind, **headers},
    )
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def test_the_server_answers_this_machine_and_this_token_alone(server: ReviewServer) -> None:
    assert server.host.startswith("127.0.0.1:") and len(server.token) >= 20
    assert call(server, "data.json")[0] == 200
    assert call(server, "data.json", token="guess")[0] == 404
    assert call(server, "data.json", Host="evil.example")[0] == 404  # a name that was made to point here
    assert call(server, "decide", {"id": "r1", "decision": "drop"}, Origin="http://evil.example")[0] == 404
    assert (
        call(server, "../../../etc/passwd")[0] == 404
        and call(server, "image/99")[0] == 404
        and call(server, "image/-1")[0] == 404
    )
    assert not server.review.decisions


def test_the_server_writes_decisions_and_says_what_is_wrong(server: ReviewServer) -> None:
    id = server.review.sample[0].id
    status, content = call(server, "decide", {"id": id, "decision": "drop"}, Origin=f"http://{server.host}")
    assert (
        status == 200
        and json.loads(content)["decisions"][id]["decision"] == "drop"
        and "error rate 100.0 % (1 of 1" in json.loads(content)["estimate"]
    )
    assert review.read(server.review.folder)[id].decision == "drop"
    wrong: tuple[Any, ...] = (
        {"id": "nobody", "decision": "keep"},
        {"id": id},
        [],
        "{",
        {"id": id, "decision": "relabel", "answers": [1]},
    )
    for body in wrong:
        status, content = call(server, "decide", body)
        assert status == 400 and json.loads(content)["error"]
    assert load(server.review.folder / "records.json") == RECORDS  # the records themselves are never changed
    assert not server.finished.is_set() and call(server, "finish", {})[0] == 200 and server.finished.wait(10)


def test_a_port_that_is_taken_is_one_line(server: ReviewServer) -> None:
    with pytest.raises(UserError, match="choose another with --port"):
        ReviewServer(server.review, port=int(server.host.partition(":")[2]))


@pytest.mark.parametrize("port", [-5, 99_999_999])
def test_a_port_that_is_none_is_one_line(server: ReviewServer, port: int) -> None:
    with pytest.raises(UserError, match=rf"--port: {port} is not in 0 to 65535"):
        ReviewServer(server.review, port=port)
