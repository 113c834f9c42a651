"""What an OpenAI-compatible server says: the text of a completion, its bill, the reason of a refusal."""

from __future__ import annotations

from typing import Any

from mllm_fl.annotate.ledger import printable
from mllm_fl.annotate.prices import text_tokens


def read(reply: Any) -> tuple[str, str]:
    """(why the answer is unusable or "", the text) of a chat completion."""
    choices = getattr(reply, "choices", None)
    if not choices:
        return "reply without choices", ""
    message = choices[0].message
    text = printable(getattr(message, "content", None) or "")
    if getattr(message, "refusal", None):
        return "refused", ""
    if choices[0].finish_reason == "length":
        return "answer cut off at max_tokens", ""
    if choices[0].finish_reason == "content_filter":
        return "refused by a content filter", ""
    return ("", text) if text.strip() else ("empty answer", "")


def tokens(reply: Any, question: str, text: str) -> tuple[int, int]:
    """(tokens in, tokens out) as the server counts them; about, by the length of the texts, where it does not."""
    usage = getattr(reply, "usage", None)
    if usage is not None:
        return usage.prompt_tokens or 0, usage.completion_tokens or 0
    return text_tokens(question), text_tokens(text)


def said(e: Any) -> str:
    """What the server says in its refusal, in the forms of OpenAI and of FastAPI, or the raw text."""
    body = getattr(e, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return short(body or getattr(e.response, "text", "") or e.message)


def short(problem: object) -> str:
    """A problem in at most 120 characters of one line."""
    words = " ".join(str(problem).split()) or type(problem).__name__
    return words if len(words) <= 120 else words[:117] + "..."
