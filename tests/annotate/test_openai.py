"""The endpoint backend, the real `openai` client against a small server on the loopback that misbehaves as told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_fl.annotate.backends.base import Request, png
from mllm_fl.annotate.backends.openai import OpenAIBackend
from mllm_fl.annotate.ledger import Entry
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import AnnotateConfig, annotate

pytest.importorskip("openai")


class Server(ThreadingHTTPServer):
    """Answers chat requests; ``plan`` holds what to do instead, one entry per request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[tuple[int, dict[str, str], str]] = []
        self.seen: list[dict[str, Any]] = []
        self.inside, self.most, self.lock = 0, 0, threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up, as it does when another request was refused for good, is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body | {"key": self.headers["Authorization"]})
            planned = self.server.plan.pop(0) if self.server.plan else None
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
        question = body["messages"][-1]["content"][1]["text"]
        status, headers, text = planned or (200, {}, reply(f"echo: {question}"))
        threading.Event().wait(0.01)
        with self.server.lock:
            self.server.inside -= 1
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(text.encode()))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def reply(text: str | None, finish: str = "stop", **message: Any) -> str:
    return json.dumps(
        {
            "id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
        }
    )  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def backend(server: Server, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("m", server.url, **{"first_pause": 0.01, "retries": 2, "concurrency": 4, **options})


def ask(chosen: OpenAIBackend, n: int = 1, questions: tuple[str, ...] = ("what?",)) -> list[Entry]:
    out: dict[int, Entry] = {}
    image = png(torch.arange(3 * 20 * 10, dtype=torch.uint8).view(3, 20, 10))
    chosen.answer([Request(image, questions, "be brief")] * n, lambda got: out.update(x for x in got if not x[1].partial))
    return [out[i] for i in range(n)]


def test_question_picture_and_system_arrive_and_the_answer_comes_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    (entry,) = ask(backend(server, api_key_env="MY_KEY", max_side=10), questions=("what?", "where?"))
    assert entry.texts == ("echo: what?", "echo: where?")
    assert (entry.prompt_tokens, entry.completion_tokens, entry.requests, entry.error) == (10, 4, 1, None)
    sent = server.seen[0]
    assert (sent["model"], sent["temperature"], sent["key"]) == ("m", 0.0, "Bearer secret")
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    picture = base64.b64decode(
        sent["messages"][1]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    )
    assert Image.open(io.BytesIO(picture)).size == (5, 10)


def test_never_more_in_flight_than_asked_for(server: Server) -> None:
    assert len(ask(backend(server, concurrency=3), 20)) == 20
    assert 1 <= server.most <= 3


def test_busy_and_failing_servers_are_asked_again(server: Server) -> None:
    server.plan = [(429, {"Retry-After": "0.05"}, "{}"), (500, {}, "oops")]
    assert ask(backend(server))[0].texts == ("echo: what?",)
    assert len(server.seen) == 3


def test_after_all_attempts_the_request_fails_and_the_others_go_on(server: Server) -> None:
    server.plan = [(503, {}, "{}")] * 3
    entries = ask(backend(server, concurrency=1), 2)
    assert [e.error for e in entries] == ["HTTP 503", None]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (reply(""), "empty answer"),
        (reply("  \n"), "empty answer"),
        (reply(None), "empty answer"),
        (reply("The picture sh", "length"), "answer cut off at max_tokens"),
        (reply(None, refusal="no"), "refused"),
        (
            json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}),
            "reply without choices",
        ),
    ],
)
def test_unusable_answers_are_failures(server: Server, body: str, why: str) -> None:
    server.plan = [(200, {}, body)]
    (entry,) = ask(backend(server))
    assert (entry.error, entry.texts) == (why, ())
    assert len(server.seen) == 1


def test_a_request_that_the_server_refuses_is_not_repeated(server: Server) -> None:
    server.plan = [(400, {}, '{"error": {"message": "image too small"}}')]
    error = ask(backend(server))[0].error
    assert error is not None
    assert error.startswith("HTTP 400: ")
    assert "image too small" in error
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "says"), [(401, "the key is refused"), (404, "no such model or path"), (403, "may not use it")]
)
def test_wrong_key_and_unknown_model_stop_at_once(server: Server, status: int, says: str) -> None:
    server.plan = [(status, {}, "{}")] * 4
    with pytest.raises(UserError, match=says) as e:
        ask(backend(server), 4)
    assert server.url in str(e.value)


def test_an_endpoint_that_is_not_there_is_named() -> None:
    gone = Server()
    url = gone.url
    gone.server_close()
    with pytest.raises(UserError, match=r"no connection .* after 2 attempts; is the server running"):
        ask(OpenAIBackend("m", url, retries=1, first_pause=0.01))


def test_without_key_and_address_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"\$OPENAI_API_KEY: no key"):
        OpenAIBackend("m")


def test_the_stage_keeps_what_came_before_the_key_was_refused(server: Server, tmp_path: Path) -> None:
    config = AnnotateConfig(
        images=4, kinds=("caption",), backend="openai", model="m", base_url=server.url, concurrency=1, retries=0
    )
    server.plan = [(200, {}, reply("one")), (200, {}, reply("two")), (401, {}, "{}")]
    with pytest.raises(UserError, match="the key is refused"):
        annotate(config, tmp_path)
    corpus = annotate(config, tmp_path)
    assert len(server.seen) == 3 + 2
    assert [r.answers[0][:4] for r in corpus.records] == ["one", "two", "echo", "echo"]
