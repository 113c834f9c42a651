"""Any OpenAI-compatible endpoint (GPT-4-class services, vLLM, SGLang, Ollama, llama.cpp, `transformers serve`) as annotator.

Pictures go as base64 PNG inside the message. Requests run concurrently up to a bound; busy or failing servers are asked again after
``Retry-After`` or a doubling pause. Servers ignore much of what they are asked for, so answers are checked by the caller.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_fl.annotate.backends.base import Deliver, Request, png
from mllm_fl.annotate.ledger import Entry
from mllm_fl.errors import UserError

_RETRY = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
_FATAL = {401: "the key is refused", 403: "the key may not use it", 404: "it knows no such model or path"}


@dataclass
class OpenAIBackend:
    """``base_url``: for example ``http://127.0.0.1:8000/v1``; None is the client's own default. Pauses are in seconds.

    ``max_side``: larger pictures are scaled down to this many pixels before they are sent.
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
    batch_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.batch_size = 16 * self.concurrency
        self._openai = _import_openai()
        self._key = os.environ.get(self.api_key_env, "")
        if not self._key and self.base_url is None:
            raise UserError(
                f"${self.api_key_env}",
                "no key for the annotation endpoint",
                "export it, or give annotate.base_url of your own server",
            )

    def parameters(self) -> dict[str, Any]:
        """Output limit, temperature and image size."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "max_side": self.max_side}

    def answer(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """See :class:`Backend`; runs its own event loop until all are answered, and delivers each answer as it comes."""
        asyncio.run(self._all(requests, deliver))

    async def _all(self, requests: Sequence[Request], deliver: Deliver) -> None:
        gate = asyncio.Semaphore(self.concurrency)
        client = self._openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout
        )

        async def one(i: int, request: Request) -> None:
            deliver([(i, await self._one(client, gate, request))])

        try:
            async with asyncio.TaskGroup() as group:
                for i, request in enumerate(requests):
                    group.create_task(one(i, request))
        except ExceptionGroup as found:
            raise found.exceptions[0] from None
        finally:
            await client.close()

    async def _one(self, client: Any, gate: asyncio.Semaphore, request: Request) -> Entry:
        start = time.perf_counter()
        picture = "data:image/png;base64," + base64.b64encode(png(request.image, self.max_side)).decode()
        texts: list[str] = []
        used = [0, 0]
        for question in request.questions:
            system = [{"role": "system", "content": request.system}] if request.system else []
            content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
            async with gate:
                reply = await self._ask(client, [*system, {"role": "user", "content": content}])
            if isinstance(reply, str):
                return Entry(
                    error=reply, prompt_tokens=used[0], completion_tokens=used[1], seconds=time.perf_counter() - start
                )
            if reply.usage is not None:
                used = [used[0] + (reply.usage.prompt_tokens or 0), used[1] + (reply.usage.completion_tokens or 0)]
            problem, text = _text(reply)
            if problem:
                return Entry(
                    error=problem, prompt_tokens=used[0], completion_tokens=used[1], seconds=time.perf_counter() - start
                )
            texts.append(text)
        return Entry(tuple(texts), None, used[0], used[1], time.perf_counter() - start)

    async def _ask(self, client: Any, messages: list[dict[str, Any]]) -> Any:
        """The server's reply, or in a few words why there is none after all attempts."""
        api = self._openai
        problem = "no attempt"
        for attempt in range(self.retries + 1):
            wait = min(self.first_pause * 2**attempt, self.longest_pause) * (
                0.5 + os.urandom(1)[0] / 510
            )  # spreads the load
            try:
                return await client.chat.completions.create(
                    model=self.model, messages=messages, max_tokens=self.max_tokens, temperature=self.temperature
                )
            except api.APIStatusError as e:
                problem = f"HTTP {e.status_code}"
                if e.status_code in _FATAL:
                    raise UserError(
                        self._place,
                        f"{_FATAL[e.status_code]} (HTTP {e.status_code}, model {self.model!r})",
                        self._way_out,
                    ) from None
                if e.status_code not in _RETRY:
                    return f"{problem}: {_short(e.message)}"
                wait = _retry_after(e.response.headers.get("retry-after"), wait)
            except api.APIConnectionError as e:  # a timeout is one of these
                problem = f"no connection ({_short(e.__cause__ or e)})"
            except (api.APIError, ValueError) as e:
                problem = f"unreadable reply ({_short(e)})"
            if attempt < self.retries:
                await asyncio.sleep(min(wait, 600.0))
        if problem.startswith("no connection"):
            raise UserError(
                self._place,
                f"{problem} after {self.retries + 1} attempts",
                "is the server running? what was answered is kept",
            )
        return problem

    @property
    def _place(self) -> str:
        return f"annotate.base_url {self.base_url or '(default)'}"

    @property
    def _way_out(self) -> str:
        return f"check annotate.model, annotate.base_url and ${self.api_key_env}"


def _import_openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError:
        raise UserError(
            'annotate.backend "openai"', "the openai client is not installed", "pip install 'mllm-fl[annotate]'"
        ) from None


def _text(reply: Any) -> tuple[str, str]:
    """(why the answer is unusable or "", the text)."""
    choices = getattr(reply, "choices", None)
    if not choices:
        return "reply without choices", ""
    text = getattr(choices[0].message, "content", None) or ""
    if getattr(choices[0].message, "refusal", None):
        return "refused", ""
    if choices[0].finish_reason == "length":
        return "answer cut off at max_tokens", ""
    return ("", text) if text.strip() else ("empty answer", "")


def _retry_after(header: str | None, fallback: float) -> float:
    try:
        return max(0.0, float(header)) if header is not None else fallback
    except ValueError:
        return fallback


def _short(problem: object) -> str:
    words = " ".join(str(problem).split()) or type(problem).__name__
    return words if len(words) <= 120 else words[:117] + "..."
