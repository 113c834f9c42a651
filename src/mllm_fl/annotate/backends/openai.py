"""Any OpenAI-compatible endpoint (GPT-4-class services, vLLM, SGLang, Ollama, llama.cpp, `transformers serve`) as annotator.

Pictures go as base64 inside the message. Requests run concurrently, as fast as the configured limits and the server allow; busy or
failing servers are asked again after ``Retry-After`` or a doubling pause. Servers ignore much of what they are asked for, or refuse it:
parameters that a server does not know are left out from then on, and answers are checked by the caller.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mllm_fl.annotate.backends.base import Deliver, Request, as_it_is, encoded_again
from mllm_fl.annotate.backends.pace import Pace, retry_after
from mllm_fl.annotate.backends.replies import read, said, short, tokens
from mllm_fl.annotate.ledger import Entry
from mllm_fl.annotate.prices import text_tokens
from mllm_fl.errors import UserError

_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_BUSY = frozenset({429, 503, 529})
_FATAL = {
    401: "the key is refused",
    402: "it wants to be paid",
    403: "the key may not use it",
    404: "it knows no such model or path",
}
_BROKE = ("insufficient_quota", "billing_hard_limit_reached")  # a 429 that no waiting ends
_PATIENCE = 600.0  # seconds, the longest pause that a server may ask for


@dataclass
class OpenAIBackend:
    """``base_url``: for example ``http://127.0.0.1:8000/v1``; None is the client's own default. Pauses are in seconds.

    ``concurrency``: requests in flight at most; a server that pushes back gets fewer. ``max_side``: larger pictures are scaled down to
    this many pixels before they are sent. ``requests_per_minute``, ``tokens_per_minute``: limits of this process.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 512
    temperature: float = 0.0
    concurrency: int = 16
    retries: int = 5
    timeout: float = 120.0
    first_pause: float = 1.0
    longest_pause: float = 60.0
    max_side: int = 768
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    batch_size: int = field(init=False)
    streams: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.batch_size = max(16, self.concurrency)
        self._openai = _import_openai()
        self._key = os.environ.get(self.api_key_env, "")
        self._refused: set[str] = set()  # parameters that this server does not take
        self._answered = 0
        self._stop: BaseException | None = None
        if not self._key and self.base_url is None:
            raise UserError(
                f"${self.api_key_env}",
                "no key for the annotation endpoint",
                "export it, or give annotate.base_url of your own server",
            )

    def parameters(self) -> dict[str, Any]:
        """Output limit, temperature and image size."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "max_side": self.max_side}

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        """See :class:`Backend`; runs its own event loop until all are answered, and delivers each answer as it comes.

        Interrupted (Ctrl-C, SIGTERM), it starts nothing new and waits for what is in flight, for that is paid; a second Ctrl-C ends it.
        """
        self._stop = None
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if in_main else None
        try:
            asyncio.run(self._all(enumerate(requests), deliver))
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        if self._stop is not None:
            raise self._stop

    @property
    def errors(self) -> Any:
        """The client's module: its exceptions."""
        return self._openai

    def client(self, **options: Any) -> Any:
        """An ``openai.OpenAI`` for this endpoint, for everything besides chat."""
        return self._openai.OpenAI(api_key=self._key or "none", base_url=self.base_url, timeout=self.timeout, **options)

    async def _all(self, requests: Iterator[tuple[int, Request]], deliver: Deliver) -> None:
        pace = Pace(self.concurrency, self.requests_per_minute, self.tokens_per_minute)
        client = self._openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout
        )

        async def worker() -> None:
            try:
                while self._stop is None and (taken := next(requests, None)) is not None:
                    deliver([(taken[0], await self._one(client, pace, taken, deliver))])
            except _Stopped:
                pass
            except (Exception, KeyboardInterrupt) as e:
                self._stop = self._stop or e

        workers = [asyncio.create_task(worker()) for _ in range(self.concurrency)]
        _on_terminate(asyncio.current_task())
        try:
            await asyncio.wait(workers)
        except asyncio.CancelledError:
            self._stop = self._stop or KeyboardInterrupt()
            await asyncio.wait(workers)
        finally:
            await client.close()

    async def _one(self, client: Any, pace: Pace, taken: tuple[int, Request], deliver: Deliver) -> Entry:
        """What came of one request; the answers before its last are delivered here, so that they are paid once."""
        at, request = taken
        start = time.perf_counter()
        texts = list(request.done)
        try:
            kind, content, ready = as_it_is(request.image, self.max_side)
            if not ready:
                kind, content = await asyncio.to_thread(encoded_again, kind, content, self.max_side)
        except ValueError as e:
            return Entry(tuple(texts), str(e))
        picture = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        for question in request.questions[len(texts) :]:
            reply, problem = await self._ask(client, pace, request, self.messages(request, question, picture))
            seconds, start = time.perf_counter() - start, time.perf_counter()
            if reply is None:
                return Entry(tuple(texts), problem, seconds=seconds)
            problem, text = read(reply)
            used = tokens(reply, question, text)
            entry = Entry(
                (*texts, text) if not problem else tuple(texts), problem or None, used[0], used[1], seconds, None, 1,
                self._provenance(reply, request), partial=not problem and len(texts) + 1 < len(request.questions),
            )  # fmt: skip
            if not entry.partial:
                return entry
            deliver([(at, entry)])
            texts.append(text)
        return Entry(tuple(texts), None)  # all of them were there

    def messages(self, request: Request, question: str, picture: str) -> list[dict[str, Any]]:
        """The chat: instructions, then the picture with the question; after an unusable answer, also what was wrong with it."""
        if request.fault:
            question = f"{question}\nYour last answer could not be used: {request.fault}."
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        system = [{"role": "system", "content": request.system}] if request.system else []
        return [*system, {"role": "user", "content": content}]

    def body(self, request: Request, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The request's JSON, without what this server refused before."""
        wanted: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": self.temperature}
        wanted["max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"] = self.max_tokens
        if request.schema is not None:
            form = {"name": "answer", "schema": request.schema, "strict": True}
            wanted["response_format"] = {"type": "json_schema", "json_schema": form}
        return {k: v for k, v in wanted.items() if k not in self._refused}

    async def _ask(self, client: Any, pace: Pace, request: Request, messages: list[dict[str, Any]]) -> tuple[Any, str]:
        """(the server's reply, "") or (None, in a few words why there is none after all attempts)."""
        attempt, known, problem, connected = 0, self._answered, "no attempt", True
        guess = text_tokens(request.system) + 400 + self.max_tokens / 2
        while True:
            body = self.body(request, messages)
            began = await pace.enter(guess)
            used: float | None = None
            wait = min(self.first_pause * 2**attempt, self.longest_pause) * (
                0.5 + os.urandom(1)[0] / 510
            )  # spreads the load
            try:
                if self._stop is not None:
                    raise _Stopped
                # what chat.completions.create() does, without its walk through the message: a tenth of the processor's time
                reply = await client.post(
                    "/chat/completions", body=body, cast_to=self._openai.types.chat.ChatCompletion
                )
                if not hasattr(reply, "choices"):
                    raise ValueError("no chat completion")
                used = float(getattr(reply.usage, "total_tokens", None) or guess)
                self._answered += 1
                pace.succeeded()
                return reply, ""
            except self._openai.APIStatusError as e:
                problem, connected = f"HTTP {e.status_code}: {said(e)}", True
                if self._adapt(e, body):
                    continue
                self._refuse(e)
                if e.status_code not in _RETRY:
                    return None, problem
                problem = f"HTTP {e.status_code}"
                asked = retry_after(e.response.headers)
                if e.status_code in _BUSY:
                    pace.pushed_back(began, None if asked is None else min(asked, _PATIENCE))
                wait = wait if asked is None else min(asked, _PATIENCE)
            except self._openai.APIConnectionError as e:  # a timeout is one of these
                problem, connected = f"no connection ({short(e.__cause__ or e)})", False
                pace.pushed_back(began, None)
            except (self._openai.APIError, ValueError) as e:
                problem, connected = f"unreadable reply ({short(e)})", True
            finally:
                await pace.leave(guess, used)
            if self._answered > known and problem == "HTTP 429":
                attempt, known = 0, self._answered  # others are served: this one only waits in the queue
            if attempt >= self.retries:
                break
            attempt += 1
            await self._pause(wait)
        if not connected and self._answered == known:
            way_out = "is the server running? what was answered is kept"
            raise UserError(self._place, f"{problem} after {self.retries + 1} attempts", way_out)
        return None, problem

    def _adapt(self, e: Any, body: dict[str, Any]) -> bool:
        """Whether the server refused a parameter that can be left out; it is left out from now on."""
        if e.status_code not in (400, 422):
            return False
        told = str(e.message) + str(getattr(e, "body", ""))
        for name in ("response_format", "max_tokens", "temperature"):
            if name in body and name in told:
                self._refused.add(name)
                return True
        return False

    def _refuse(self, e: Any) -> None:
        """Raise for what no repetition mends."""
        code = str(getattr(e, "code", "") or "")
        spoken = any(f"{mark}{self.model}{mark}" in said(e) for mark in "'\"`")
        named = e.status_code == 400 and ("model" in code or spoken) and not self._answered
        if e.status_code in _FATAL or code in _BROKE or named:
            why = _FATAL.get(
                e.status_code, "the account is exhausted" if code in _BROKE else f"it refuses the model: {said(e)}"
            )
            raise UserError(self._place, f"{why} (HTTP {e.status_code}, model {self.model!r})", self._way_out) from None

    async def _pause(self, seconds: float) -> None:
        """Wait, but not on when everything ends."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._stop is not None:
                raise _Stopped
            await asyncio.sleep(min(left, 0.25))

    def _provenance(self, reply: Any, request: Request) -> dict[str, Any]:
        found = {
            "endpoint": self.base_url or "default",
            "served": getattr(reply, "model", None),
            "id": getattr(reply, "id", None),
        }
        sent = {"refused": sorted(self._refused)} if self._refused else {}
        return {**found, **sent, **({"again": request.fault} if request.fault else {})}

    @property
    def _place(self) -> str:
        return f"annotate.base_url {self.base_url or '(default)'}"

    @property
    def _way_out(self) -> str:
        return f"check annotate.model, annotate.base_url and ${self.api_key_env}"


class _Stopped(Exception):
    """Another request has met an error that ends all."""


def _on_terminate(task: asyncio.Task[Any] | None) -> None:
    """SIGTERM ends the work as Ctrl-C does: what is in flight is awaited."""
    if task is not None and threading.current_thread() is threading.main_thread():
        try:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        except (NotImplementedError, RuntimeError):
            pass  # Windows: SIGTERM ends at once, and what is in flight is asked again


def _import_openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError:
        raise UserError(
            'annotate.backend "openai"', "the openai client is not installed", "pip install 'mllm-fl[annotate]'"
        ) from None
