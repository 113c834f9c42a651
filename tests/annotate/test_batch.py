"""OpenAI's Batch form against a server on the loopback that keeps files and batches, with the real client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.annotate.backends import batch
from mllm_fl.annotate.batches import Batches
from mllm_fl.annotate.engine import Pending
from mllm_fl.annotate.ledger import Ledger
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import AnnotateConfig, annotate

pytest.importorskip("openai")


class Service(ThreadingHTTPServer):
    """Files and batches. A batch is done when it is looked at; ``expire``: so many of its last requests expire; ``fail``: custom answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.at_work, self.expire, self.refuse, self.drop_reply = False, 0, "", False
        self.wrong: dict[int, tuple[int, str]] = {}  # request number over all batches -> (status, text)
        self.answered = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def lines(self) -> list[dict[str, Any]]:
        """Every request that was handed in."""
        found = (self.files[b["input_file_id"]] for b in self.batches.values())
        return [json.loads(line) for content in found for line in content.splitlines()]

    def work(self, found: dict[str, Any]) -> None:
        requests = [json.loads(line) for line in self.files[found["input_file_id"]].splitlines()]
        if self.refuse:
            found |= {
                "status": "failed",
                "errors": {
                    "object": "list",
                    "data": [{"code": "bad", "message": self.refuse, "line": 1, "param": None}],
                },
            }
            return
        kept = requests[: len(requests) - self.expire]
        good, bad = [], []
        for request in kept:
            self.answered += 1
            status, text = self.wrong.get(self.answered, (200, f"answer {self.answered}"))
            body = {
                "id": "c", "object": "chat.completion", "created": 1, "model": "served", "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            }  # fmt: skip
            line = {"custom_id": request["custom_id"], "error": None}
            if status == 200:
                good.append({**line, "response": {"status_code": 200, "body": body}})
            else:
                bad.append({**line, "response": {"status_code": status, "body": {"error": {"message": text}}}})
        for request in requests[len(kept) :]:
            bad.append(
                {
                    "custom_id": request["custom_id"],
                    "response": None,
                    "error": {"code": "batch_expired", "message": "late"},
                }
            )
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):  # in any order
            if lines:
                self.files[f"{name}-{found['id']}"] = "".join(json.dumps(x) + "\n" for x in lines).encode()
                found[name] = f"{name}-{found['id']}"
        found["status"] = "expired" if self.expire else "completed"
        self.expire = 0


class _Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        s, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            parts = message_from_bytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + content
            ).get_payload()
            (file,) = [p.get_payload(decode=True) for p in parts if p.get_filename()]  # type: ignore[union-attr]
            name = f"file-{len(s.files)}"
            s.files[name] = file  # type: ignore[assignment]
            return self._say(
                {
                    "id": name,
                    "object": "file",
                    "bytes": len(content),
                    "created_at": 1,
                    "filename": "x",
                    "purpose": "batch",
                    "status": "processed",
                }
            )
        asked = json.loads(content)
        name = f"batch-{len(s.batches)}"
        s.batches[name] = {
            "id": name, "object": "batch", "created_at": 1, "status": "in_progress", **asked,
        }  # fmt: skip
        if s.drop_reply:
            s.drop_reply = False
            self.close_connection = True
            return None
        return self._say(s.batches[name])

    def do_GET(self) -> None:
        s, parts = self.server, self.path.partition("?")[0].split("/")
        if parts[2] == "files":
            content = s.files[parts[3]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif len(parts) == 3:
            self._say({"object": "list", "data": list(s.batches.values()), "has_more": False})
        else:
            found = s.batches[parts[3]]
            if not s.at_work and found["status"] == "in_progress":
                s.work(found)
            self._say(found)

    def _say(self, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(batch, "POLL", 0.01)
    found = Service()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def config(service: Service, **changes: Any) -> AnnotateConfig:
    made = {
        "images": 7,
        "kinds": ("caption",),
        "backend": "openai",
        "model": "m",
        "base_url": service.url,
        "batch": True,
    }
    return AnnotateConfig(**{**made, **changes})


def test_files_keep_to_the_size_cap_and_answers_find_their_questions(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST", 3)
    service.wrong = {2: (400, "image too small")}
    prices = tmp_path / "prices.toml"
    prices.write_text("[m]\ninput = 1e6\noutput = 0.0\n")
    corpus = annotate(config(service, prices=str(prices)), tmp_path / "c")
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches.values()] == [3, 3, 1]
    assert len({line["custom_id"] for line in service.lines()}) == 7
    first = service.lines()[0]
    assert (first["method"], first["url"], first["body"]["model"]) == ("POST", "/v1/chat/completions", "m")
    assert first["body"]["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert corpus.card["failures"] == {"HTTP 400: image too small": 1}
    assert [r.answers[0] for r in corpus.records] == [f"answer {i}" for i in (1, 3, 4, 5, 6, 7)]  # in the order asked
    assert corpus.card["bill"] == {
        "requests": 6,
        "prompt_tokens": 60,
        "completion_tokens": 12,
        "cost": 30.0,
    }  # at half the price
    assert not list((tmp_path / "c/batches").glob("*.part"))
    annotate(config(service, prices=str(prices)), tmp_path / "c", retry=True)
    assert len(service.lines()) == 8  # the failed one alone


def test_a_file_ends_before_it_is_too_large(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "LARGEST", 3000)
    assert len(annotate(config(service), tmp_path).records) == 7
    sizes = [len(service.files[b["input_file_id"]]) for b in service.batches.values()]
    assert len(sizes) > 1
    assert max(sizes) <= 3000
    monkeypatch.setattr(batch, "LARGEST", 100)
    with pytest.raises(UserError, match="more than a batch file may have"):
        annotate(config(service, seed=2), tmp_path / "other")


def test_who_does_not_wait_fetches_later_and_pays_once(service: Service, tmp_path: Path) -> None:
    service.at_work = True
    for _ in range(3):
        with pytest.raises(Pending, match="1 batches are at work at the endpoint; run the same command later"):
            annotate(config(service), tmp_path, wait=False)
    service.at_work = False
    assert len(annotate(config(service), tmp_path, wait=False).records) == 7
    assert len(service.lines()) == 7


def test_what_expired_is_handed_in_again_and_nothing_else(service: Service, tmp_path: Path) -> None:
    service.expire = 3
    corpus = annotate(config(service), tmp_path)
    assert (len(corpus.records), corpus.card["failures"]) == (7, {})
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches.values()] == [7, 3]
    assert corpus.card["bill"]["requests"] == 7


def test_a_batch_whose_receipt_was_lost_is_adopted(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint took it, and the connection broke before it said so: it is found by its mark, not made twice."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    service.drop_reply = True
    assert len(annotate(config(service), tmp_path).records) == 7
    assert len(service.batches) == 1


@pytest.mark.parametrize("state", ["writing", "written", "uploaded"])
def test_killed_at_any_step_it_goes_on(
    state: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Batches.set

    def dying(self: Batches, id: str, now: str, **values: object) -> Any:
        steps = {"writing": "written", "written": "uploaded", "uploaded": "submitted"}
        if now == steps[state]:
            raise KeyboardInterrupt  # before it is written down
        return real(self, id, now, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "set", dying)
        with pytest.raises(KeyboardInterrupt):
            annotate(config(service), tmp_path)
    assert len(annotate(config(service), tmp_path).records) == 7
    assert len(service.batches) == 1  # nothing was paid twice
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.totals().requests == 7


def test_an_endpoint_that_refuses_a_file_is_one_line_and_its_questions_are_open_again(
    service: Service, tmp_path: Path
) -> None:
    service.refuse = "line 1 is no request"
    with pytest.raises(UserError, match="batch batch-0: refused by the endpoint: line 1 is no request"):
        annotate(config(service), tmp_path)
    service.refuse = ""
    assert len(annotate(config(service), tmp_path).records) == 7


def test_the_caps_hold_for_what_a_batch_may_cost_at_most(service: Service, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stopped at max_requests 4 \(4 answered calls so far\): 4 of 7 annotations are there"
    ):
        annotate(config(service, max_requests=4), tmp_path)
    prices = tmp_path / "prices.toml"
    prices.write_text("[m]\ninput = 0.0\noutput = 1.0\nbatch = 1.0\n")  # at most 256 tokens an answer
    with pytest.raises(UserError, match="stopped at max_cost"):
        annotate(config(service, max_cost=261e-6, prices=str(prices), seed=2), tmp_path / "other")
    # each may cost 256, and costs 2 in the end: one at a time, until 6 are spent and 262 would be too much
    assert [len(service.files[b["input_file_id"]].splitlines()) for b in service.batches.values()] == [4, 1, 1, 1]
