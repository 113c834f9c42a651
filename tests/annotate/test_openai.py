"""The endpoint backend, the real `openai` client against a small server on the loopback that misbehaves as told."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm_fl.annotate.backends.base import Request, encoded, png
from mllm_fl.annotate.backends.openai import OpenAIBackend
from mllm_fl.annotate.ledger import Entry, Ledger
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
        self.busy: dict[str, int] = {}  # question -> how often it is refused
        self.at: dict[int, Callable[[], None]] = {}  # request number -> what happens when it comes

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
            happens = self.server.at.get(len(self.server.seen))
            planned = self.server.plan.pop(0) if self.server.plan else None
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
        if happens is not None:
            happens()
        question = body["messages"][-1]["content"][1]["text"]
        if self.server.busy.get(question):
            self.server.busy[question] -= 1
            planned = (429, {}, "{}")
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
    chosen.answer(
        [Request(image, questions, "be brief")] * n, lambda got: out.update(x for x in got if not x[1].partial)
    )
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


def refusing(message: str, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "code": code, "param": None, "type": "invalid_request_error"}})


def test_what_a_server_does_not_take_is_left_out_from_then_on(server: Server) -> None:
    """Newer services want max_completion_tokens; older ones know no response_format."""
    server.plan = [
        (
            400,
            {},
            refusing("Unsupported parameter: 'max_tokens' is not supported, use 'max_completion_tokens' instead."),
        ),
        (422, {}, '{"detail": "response_format is not known"}'),
    ]
    chosen = backend(server, concurrency=1)
    image = png(torch.zeros(3, 8, 8, dtype=torch.uint8))
    out: list[Entry] = []
    chosen.answer(
        [Request(image, ("what?",), schema={"type": "object"})] * 2, lambda got: out.extend(e for _, e in got)
    )
    assert [e.error for e in out] == [None, None]
    sent = [set(x) - {"key", "messages", "model"} for x in server.seen]
    assert sent[0] == {"max_tokens", "temperature", "response_format"}
    assert sent[1] == {"max_completion_tokens", "temperature", "response_format"}
    assert sent[2] == sent[3] == {"max_completion_tokens", "temperature"}
    assert out[1].provenance["refused"] == ["max_tokens", "response_format"]


def test_an_exhausted_account_is_not_waited_for(server: Server) -> None:
    server.plan = [(429, {}, refusing("You exceeded your quota", "insufficient_quota"))]
    with pytest.raises(UserError, match="the account is exhausted"):
        ask(backend(server))
    assert len(server.seen) == 1


def test_who_only_waits_in_the_queue_is_not_given_up(server: Server) -> None:
    """Refused more often than it has attempts, but others are served in between."""
    server.busy = {"late?": 4}
    chosen = backend(server, concurrency=2, retries=1, first_pause=0.1)
    image = png(torch.zeros(3, 8, 8, dtype=torch.uint8))
    out: dict[int, Entry] = {}
    asked = ["late?", *(f"{i}?" for i in range(60))]
    chosen.answer([Request(image, (q,)) for q in asked], lambda got: out.update(got))
    assert [out[i].error for i in range(61)] == [None] * 61
    assert len(server.seen) == 61 + 4


def test_an_answer_in_the_form_of_a_page_is_no_answer(server: Server) -> None:
    server.plan = [(200, {"Content-Type": "text/html"}, "<html>busy</html>")]
    assert ask(backend(server))[0].texts == ("echo: what?",)
    assert len(server.seen) == 2


def test_halves_of_characters_break_nothing(server: Server, tmp_path: Path) -> None:
    """A server cuts an emoji in two, a file's name is no UTF-8, another holds what some call the end of a line."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate((b"\xff.png", "a\u2028b.png".encode())):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(Path(os.fsdecode(os.path.join(os.fsencode(photos), name))))
    (photos / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    server.plan = [(200, {}, reply("a smile \ud83d"))]  # json.dumps writes it as half a pair
    config = AnnotateConfig(
        source=f"folder:{photos}", kinds=("caption",), backend="openai", model="m", base_url=server.url, concurrency=1
    )
    for _ in range(2):
        corpus = annotate(config, tmp_path / "corpus", retry=True)
        assert len(corpus.records) == 2
        assert corpus.card["coverage"] == {"ok": 2, "corrupt": 1}
    assert sum(r.answers == ("a smile ?",) for r in corpus.records) == 1
    assert len(server.seen) == 2


def test_files_go_as_they_are_unless_they_are_large_or_turned(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20), (200, 10, 10)).save(path, quality=80)
    assert encoded(path, 768) == ("image/jpeg", path.read_bytes())
    kind, content = encoded(path, 10)
    assert (kind, Image.open(io.BytesIO(content)).size) == ("image/jpeg", (10, 5))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, exif=turned)
    assert Image.open(io.BytesIO(encoded(path, 768)[1])).size == (20, 40)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.bmp")
    assert encoded((tmp_path / "b.bmp").read_bytes())[0] == "image/png"
    for content in (b"no image", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError, match="cannot be read"):
            encoded(content)
    with pytest.raises(ValueError, match="missing"):
        encoded(tmp_path / "absent.png")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_waits_for_what_is_paid_and_asks_nothing_twice(
    number: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AnnotateConfig(
        images=12,
        kinds=("caption",),
        backend="openai",
        model="m",
        base_url=server.url,
        concurrency=4,
        prompts="instruct",
    )
    server.at = {5: lambda: os.kill(os.getpid(), number)}
    with pytest.raises(KeyboardInterrupt):
        annotate(config, tmp_path)
    asked = len(server.seen)
    assert 5 <= asked <= 9
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.totals().requests == asked  # every call that went out is on the books
    annotate(config, tmp_path)
    assert len(server.seen) == 12


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
