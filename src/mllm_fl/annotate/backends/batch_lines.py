"""The lines of OpenAI's Batch form: a question's name in them, and what a line of an output or error file says."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

from mllm_fl.annotate.backends.replies import read
from mllm_fl.annotate.ledger import Key


def name_of(key: Key) -> str:
    """The question's name in a batch file."""
    return hashlib.sha256(json.dumps(key.columns).encode()).hexdigest()[:40]


def reply_of(line: Any) -> tuple[str, str | None, Any]:
    """(text, why it is unusable or None, the chat completion or None) of one line of an output or error file."""
    if line is None:
        return "", "expired", None
    error, response = line.get("error") or {}, line.get("response") or {}
    status = response.get("status_code")
    if status == 200:
        reply = json.loads(json.dumps(response.get("body") or {}), object_hook=lambda d: SimpleNamespace(**d))
        try:
            problem, text = read(reply)
        except AttributeError:
            problem, text = "unreadable reply", ""
        return text, problem or None, reply
    if error.get("code") in ("batch_expired", "batch_cancelled"):
        return "", "expired", None
    body = response.get("body")
    said = (
        error.get("message") or (body.get("error") or {}).get("message", "")
        if isinstance(body, dict)
        else error.get("message", "")
    )
    return "", f"HTTP {status}: {said}"[:160] if status else str(said or "refused")[:160], None
