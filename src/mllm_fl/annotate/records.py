"""Annotations in LLaVA's form: a picture and a conversation about it (arXiv:2304.08485, §3; the files' layout is theirs).

``records.json`` is one JSON list. Each entry has ``id``, ``image`` (a path relative to the image folder) and ``conversations``, turns
``{"from": "human" | "gpt", "value": text}`` that alternate, begin with the human and end with the model; ``<image>`` stands
exactly once, in the first turn. Other keys are allowed and not read, except our own ``kind``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError

IMAGE = "<image>"


@dataclass(frozen=True)
class Turn:
    """One thing said: ``speaker`` is "human" or "gpt" (whatever model it was)."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Record:
    """One annotation. ``kind`` is caption, conversation, detail or reasoning; empty when a foreign file does not say."""

    id: str
    image: str
    turns: tuple[Turn, ...]
    kind: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in ``records.json``."""
        said = [{"from": t.speaker, "value": t.text} for t in self.turns]
        kind = {"kind": self.kind} if self.kind else {}
        return {"id": self.id, "image": self.image, **kind, "conversations": said}

    @property
    def answers(self) -> tuple[str, ...]:
        """What the model said, in order."""
        return tuple(t.text for t in self.turns if t.speaker == "gpt")


def parse(raw: Any, place: str) -> Record:
    """A checked record from one entry of the JSON list.

    Raises:
        UserError: a missing key, a wrong type, an unsafe path, turns that do not alternate, ``<image>`` not exactly once in the first.
    """
    if not isinstance(raw, dict):
        raise UserError(place, f"expected an object, got {type(raw).__name__}", "see LLaVA's chat.json for the form")
    for key in ("id", "image"):
        if not isinstance(raw.get(key), str | int) or raw[key] == "":
            raise UserError(
                place, f"key {key!r} is missing or not a string", "every record needs id, image and conversations"
            )
    said = raw.get("conversations")
    if not isinstance(said, list) or not said:
        raise UserError(place, "key 'conversations' is missing or empty", "give at least one human and one gpt turn")
    turns: list[Turn] = []
    for i, turn in enumerate(said):
        ok = isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        if not ok:
            raise UserError(place, f"turn {i + 1} lacks 'from' or 'value'", 'write {"from": "human", "value": "..."}')
        turns.append(Turn(turn["from"], turn["value"]))
    kind = raw.get("kind", "")
    record = Record(str(raw["id"]), str(raw["image"]), tuple(turns), kind if isinstance(kind, str) else "")
    validate(record, place)
    return record


def validate(record: Record, place: str) -> None:
    """Refuse a record that cannot be trained on; see :func:`parse`."""
    for text in (record.id, record.image, record.kind, *(t.text for t in record.turns)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(place, "holds half a character (a lone surrogate)", "write the text as UTF-8") from None
    check_path(record.image, place)
    speakers = [t.speaker for t in record.turns]
    if len(speakers) < 2 or len(speakers) % 2 or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise UserError(
            place, f"the speakers are {', '.join(speakers)}", "human and gpt alternate, human first and gpt last"
        )
    where = [i for i, t in enumerate(record.turns) for _ in range(t.text.count(IMAGE))]
    if where != [0]:
        turns = f"in turns {', '.join(str(i + 1) for i in where)}" if where else "nowhere"
        raise UserError(place, f"{IMAGE} stands {turns}", "it stands exactly once, in the first human turn")
    for i, t in enumerate(record.turns):
        if t.speaker == "gpt" and not t.text.strip():
            raise UserError(place, f"the answer in turn {i + 1} is empty", "remove the record or annotate it again")


def check_path(image: str, place: str) -> None:
    """Refuse a path that is absolute or climbs out of the image folder."""
    posix, windows = PurePosixPath(image), PureWindowsPath(image)
    escapes = posix.is_absolute() or bool(windows.drive or windows.root) or ".." in posix.parts + windows.parts
    if escapes or "\0" in image or not posix.parts:
        raise UserError(place, f"image path {image!r} leaves the image folder", "use a relative path without '..'")


def load(path: Path) -> list[Record]:
    """All records of a JSON list.

    Raises:
        UserError: missing, not JSON, not a list, an invalid record, two records with the same id.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(path, "no such file", "make a corpus with `mllm-fl annotate CONFIG`") from None
    except (OSError, ValueError) as e:
        raise UserError(
            path, f"cannot be read as JSON ({e})", "restore it, or annotate again: answers are in the ledger"
        ) from None
    if not isinstance(raw, list):
        raise UserError(
            path, f"holds a {type(raw).__name__}, not a list of records", "see LLaVA's chat.json for the form"
        )
    records = [parse(entry, f"{path}: record {i + 1}") for i, entry in enumerate(raw)]
    seen: set[str] = set()
    for i, record in enumerate(records):
        if record.id in seen:
            raise UserError(f"{path}: record {i + 1}", f"id {record.id!r} occurs twice", "ids are unique")
        seen.add(record.id)
    return records


def save(records: Sequence[Record], path: Path) -> None:
    """Write the list, one record a line, whole or not at all; refuses invalid records."""
    for i, record in enumerate(records):
        validate(record, f"{path}: record {i + 1}")
    lines = ",\n".join(json.dumps(r.to_json(), ensure_ascii=False) for r in records)
    write_whole(path, f"[\n{lines}\n]\n".encode())
