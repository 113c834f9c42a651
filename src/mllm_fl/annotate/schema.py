"""The JSON that a model is asked for, as pydantic models: sent to servers that read a schema, and checked here whoever answered."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mllm_fl.errors import UserError


def schema(form: str, labels: Sequence[str] = ()) -> dict[str, Any] | None:
    """The JSON schema of a form of answer, closed (no other keys), as strict servers want it; None for plain text.

    ``form``: "plain", "dialogue" (``{"turns": [{"question", "answer"}]}``) or "label" (``{"label"}``, one of ``labels``).
    """
    if form == "plain":
        return None
    model = _dialogue_model() if form == "dialogue" else _label_model(tuple(labels))
    found: dict[str, Any] = model.model_json_schema()
    return found


def dialogue(text: str) -> list[tuple[str, str]]:
    """The question-answer pairs of a JSON answer. Raises ``ValueError`` in a few words when it is anything else.

    A code fence around it is tolerated, and so are a bare list of pairs and a single pair.
    """
    raw = _parse(text)
    if isinstance(raw, list):
        raw = {"turns": raw}
    elif isinstance(raw, dict) and "question" in raw:
        raw = {"turns": [raw]}
    return [(turn.question, turn.answer) for turn in _validate(_dialogue_model(), raw).turns]


def label(text: str, labels: Sequence[str]) -> str:
    """The label of an answer, spelt as in ``labels``. Raises ``ValueError`` when it is none of them.

    A bare word is taken for the label; upper and lower case, blanks and a full stop do not matter, nothing else is guessed.
    """
    try:
        raw = _parse(text)
    except ValueError:
        raw = text
    said = raw.get("label") if isinstance(raw, dict) else raw
    if not isinstance(said, str) or not said.strip():
        raise ValueError("answer holds no label")
    wanted = _plain(said)
    for one in labels:
        if _plain(one) == wanted:
            return one
    raise ValueError("answer is not in the list of labels")


def _plain(word: str) -> str:
    return " ".join(word.replace("_", " ").split()).strip(" .\"'").casefold()


def _parse(text: str) -> Any:
    body = text.strip()
    if body.startswith("```"):
        body = body.partition("\n")[2].rpartition("```")[0].strip()
    if not body:
        raise ValueError("empty answer")
    try:
        return json.loads(body)
    except ValueError:
        raise ValueError("answer is not JSON") from None


def _validate(model: Any, raw: Any) -> Any:
    try:
        return model.model_validate(raw)
    except _pydantic().ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "answer"
        raise ValueError(
            f"answer does not fit the schema: {where}: {str(first['msg']).lower().removeprefix('value error, ')}"[:160]
        ) from None


@functools.cache
def _dialogue_model() -> Any:
    pydantic = _pydantic()
    closed = pydantic.ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})
    text = Annotated[str, pydantic.AfterValidator(_said)]  # not min_length: strict servers refuse the keyword
    pair = pydantic.create_model("Turn", __config__=closed, question=(text, ...), answer=(text, ...))
    turns = Annotated[list[pair], pydantic.AfterValidator(_said)]  # type: ignore[valid-type]
    return pydantic.create_model("Dialogue", __config__=closed, turns=(turns, ...))


def _said(value: Any) -> Any:
    if not (value.strip() if isinstance(value, str) else value):
        raise ValueError("is empty")
    return value.strip() if isinstance(value, str) else value


@functools.cache
def _label_model(labels: tuple[str, ...]) -> Any:
    pydantic = _pydantic()
    closed = pydantic.ConfigDict(json_schema_extra={"additionalProperties": False})
    return pydantic.create_model("Label", __config__=closed, label=(Literal[labels], ...))


def _pydantic() -> Any:
    try:
        return importlib.import_module("pydantic")
    except ImportError:
        raise UserError("annotate.kinds", "pydantic is not installed", "pip install 'mllm-fl[annotate]'") from None
