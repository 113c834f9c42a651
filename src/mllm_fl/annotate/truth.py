"""What is known about the pictures of a corpus beyond its annotations: exact scenes, shapes with questions, captions by people, labels.

``truth.jsonl``: a line per picture, ``{"image": path in the corpus, "truth": {...}}``. The truth holds one of
``glyph`` (a rendered scene), ``shape`` and ``colour`` (with ``qa``, questions and answers), ``captions`` (sentences by people), ``labels`` (class names).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_fl.annotate.agreement import stated
from mllm_fl.annotate.objects import Words, everyday
from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError

FILE = "truth.jsonl"
KINDS = ("glyph", "shape", "captions", "labels")
SHAPES = Words({"circle": (), "rectangle": ("square",), "triangle": ()})
COLOURS = Words(
    {"red": (), "green": (), "blue": (), "black": (), "gray": ("grey",), "teal": (), "brown": (), "yellow": ()}
)
_DENIED = re.compile(
    r"\b(?:no|not|without|never|neither|nor|nothing)\b(?:\s+(?!is\b|are\b|can\b)[\w-]+){0,4}", re.IGNORECASE
)
_THERE = re.compile(r"\b(?:is|are|do(?:es)?|can)\b.*\b(?:there|contain|present|see|show|visible|have)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(?:an?|the)\s+$", re.IGNORECASE)
_COMMON = frozenset(("can", "plain", "orange", "bear", "seal", "train", "rose", "ray"))
"""Labels that are other words too: they count only right after an article."""


@dataclass(frozen=True)
class Claims:
    """What a record says that its truth decides: how many statements, and those that are false."""

    made: int
    false: tuple[str, ...]


def kind_of(truth: Mapping[str, Any]) -> str | None:
    """Which of :data:`KINDS`, None when it is none of them."""
    return next((k for k in KINDS if truth.get(k)), None)


def vocabulary(truths: Mapping[str, Mapping[str, Any]]) -> Words:
    """All labels of a corpus: naming one of them about a picture that has another is false."""
    return Words({name: () for t in truths.values() for name in t.get("labels") or ()})


def claims(record: Record, truth: Mapping[str, Any], labels: Words) -> Claims:
    """The statements of a record's answers that ``truth`` decides.

    A thing that an answer names counts as stated unless it stands behind a negation; "yes" to a question that asks whether something is there states that it is, "no" that it is not.
    Questions whose answers are known are held against these. Of ``captions`` a thing that no person mentioned counts as false, though it may be there: an upper bound.
    """
    made, false = 0, []
    known = {_plain(q["question"]): _plain(q["answer"]) for q in truth.get("qa") or ()}
    for human, gpt in zip(record.turns[::2], record.turns[1::2], strict=True):
        question, answer = _plain(human.text), _plain(gpt.text)
        if question in known:
            made += 1
            if known[question] not in answer.split():
                false.append(f"{known[question]!r} is the answer to {question!r}, not {answer[:40]!r}")
            continue
        yes = re.match(r"(yes|no)\b", answer)
        if yes and _THERE.search(question):
            for thing, right in _named(question, truth, labels):
                made += 1
                if right is not (yes.group(1) == "yes"):
                    false.append(thing if yes.group(1) == "yes" else f"no {thing}")
            continue
        found = _named(_DENIED.sub(" ", gpt.text), truth, labels)
        made += len(found)
        false += [thing for thing, right in found if not right]
    return Claims(made, tuple(false))


def _plain(text: str) -> str:
    return " ".join(text.replace(IMAGE, " ").lower().replace("grey", "gray").split()).strip(" ?.!")


def _named(text: str, truth: Mapping[str, Any], labels: Words) -> list[tuple[str, bool]]:
    """(what is stated, whether it is so) for each statement that the truth decides."""
    kind = kind_of(truth)
    if kind == "glyph":
        scene = truth["glyph"]
        return [(f"{a} {v}", str(scene[a]) == v) for a, v in stated(text).items() if a in scene]
    if kind == "shape":
        forms = [(x, x == truth["shape"]) for x in SHAPES.named(text)]
        return forms + [(x, x == truth["colour"]) for x in COLOURS.named(text) if truth.get("colour")]
    if kind == "captions":
        there = {thing for c in truth["captions"] for thing in everyday().named(c)}
        return [(x, x in there) for x in everyday().named(text)]
    if kind == "labels":
        return [(x, x in truth["labels"]) for x in labels.named(text) if x not in _COMMON or _meant(x, text)]
    return []


def _meant(word: str, text: str) -> bool:
    return any(
        _ARTICLE.search(text[: m.start()]) for m in re.finditer(rf"\b{re.escape(word)}s?\b", text, re.IGNORECASE)
    )


def load(folder: Path, images: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is known about these pictures: of ``truth.jsonl``, else of ``scenes.jsonl``, else of the folder that the corpus was annotated from."""
    if (folder / FILE).exists():
        return {
            str(r["image"]): r["truth"]
            for r in rows(folder / FILE)
            if "image" in r and isinstance(r.get("truth"), dict)
        }
    if (folder / "scenes.jsonl").exists():
        return {str(r["image"]): {"glyph": r} for r in rows(folder / "scenes.jsonl") if "image" in r}
    return _from_source(folder, images)


def _from_source(folder: Path, images: Sequence[str]) -> dict[str, dict[str, Any]]:
    begun, pictures = folder / "annotate.json", folder / "pictures.jsonl"
    if not (begun.exists() and pictures.exists()):
        return {}
    try:
        source = str(json.loads(begun.read_text(encoding="utf-8")).get("source", ""))
    except (OSError, ValueError):
        return {}
    pool = Path(source.removeprefix("folder:"))
    if not source.startswith("folder:") or not (pool / FILE).exists():
        return {}
    by_path = {str(r.get("path")): r["truth"] for r in rows(pool / FILE) if isinstance(r.get("truth"), dict)}
    here = {
        str(r["image"]): by_path[str(r["source"])]
        for r in rows(pictures)
        if r.get("image") and str(r.get("source")) in by_path
    }
    return {image: here[image] for image in images if image in here}


def save(folder: Path, truths: Mapping[str, Mapping[str, Any]], key: str = "image") -> None:
    """Write ``truth.jsonl``; ``key``: "image" in a corpus, "path" in a folder of acquired pictures."""
    write_whole(
        folder / FILE,
        "".join(json.dumps({key: i, "truth": t}, ensure_ascii=False) + "\n" for i, t in truths.items()).encode(),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        UserError: it cannot be read; names the line.
    """
    out: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # no other character ends a line of JSON
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(path, f"cannot be read ({e})", "restore it") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {n}", "is not a JSON object", "restore the file")
        out.append(row)
    return out
