"""What a model is asked, kind by kind: our own words, for models that see the picture. A changed word means a new version.

Four kinds, after LLaVA (arXiv:2304.08485, §3): a brief **caption** (what CC-595K has), a **conversation** of several turns,
a **detail**ed description, and **reasoning** beyond what is seen. LLaVA's prompts fed captions and boxes to a model that sees nothing;
open images have neither, so these ask about the picture itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm_fl.annotate.records import IMAGE, Record, Turn, validate
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.questions import QUESTIONS

KINDS = ("caption", "conversation", "detail", "reasoning")

_SYSTEM = (
    "You describe photographs and drawings for a training set. Say only what can be seen; if something cannot be made out, leave it out. "
    "Write plain English without lists, headings, or remarks about yourself, the request, or the quality of the file."
)


@dataclass(frozen=True)
class Prompt:
    """One kind of annotation.

    ``variants``: wordings, one of which each picture gets; a wording is one or more questions, each asked on its own about the
    picture. ``form``: "plain": question and answer become the record's turns. "dialogue": the answer itself is a JSON list of
    ``{"question", "answer"}``, which become the turns.
    """

    kind: str
    version: str
    variants: tuple[tuple[str, ...], ...]
    system: str = ""
    form: Literal["plain", "dialogue"] = "plain"

    def questions(self, image: str) -> tuple[str, ...]:
        """The wording for the picture with this SHA-256: the same one every time."""
        return self.variants[int(image[:12], 16) % len(self.variants)]

    def record(self, id: str, image: str, questions: Sequence[str], texts: Sequence[str]) -> Record:
        """The record that these answers make. Raises ``ValueError`` with the reason when they make none."""
        if len(texts) != len(questions):
            raise ValueError(f"{len(texts)} answers to {len(questions)} questions")
        pairs = _dialogue(texts[0]) if self.form == "dialogue" else list(zip(questions, texts, strict=True))
        turns: list[Turn] = []
        for question, answer in pairs:
            if not answer.strip():
                raise ValueError("empty answer")
            if IMAGE in question + answer:
                raise ValueError(f"answer contains {IMAGE}")
            begin = "" if turns else f"{IMAGE}\n"
            turns += [Turn("human", begin + question.strip()), Turn("gpt", answer.strip())]
        record = Record(id, image, tuple(turns), self.kind)
        try:
            validate(record, "answer")
        except UserError as e:
            raise ValueError(str(e)) from None
        return record


def _dialogue(text: str) -> list[tuple[str, str]]:
    """The question-answer pairs of a JSON answer; a code fence around it is tolerated, anything else is not."""
    body = text.strip()
    if body.startswith("```"):
        body = body.partition("\n")[2].rpartition("```")[0]
    try:
        raw: Any = json.loads(body)
    except ValueError:
        raise ValueError("answer is not JSON" if body else "empty answer") from None
    raw = raw if isinstance(raw, list) else [raw]
    pairs = []
    for entry in raw:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(k), str) and entry[k].strip() for k in ("question", "answer")
        ):
            raise ValueError("answer lacks 'question' or 'answer'")
        pairs.append((entry["question"], entry["answer"]))
    if not pairs:
        raise ValueError("answer holds no question")
    return pairs


_JSON = 'Reply with JSON only: a list of objects, each with the keys "question" and "answer".'

INSTRUCT = {
    "caption": Prompt(
        "caption",
        "caption-1",
        (("Say in one short sentence what this picture shows.",), ("Give this picture a brief caption.",)),
        _SYSTEM,
    ),
    "conversation": Prompt(
        "conversation",
        "conversation-1",
        (
            (
                "Invent a conversation of three questions and answers between a person who looks at this picture and an assistant who sees it "
                "too. Ask about the things in it, how many there are, their colours, where they are and what they do. Ask only what the "
                f"picture answers beyond doubt. {_JSON}",
            ),
        ),
        _SYSTEM,
        "dialogue",
    ),
    "detail": Prompt(
        "detail",
        "detail-1",
        (
            ("Describe everything that can be seen in this picture, in one paragraph.",),
            ("Look closely: what is in this picture, and how do its parts look and lie to each other?",),
            ("Write a thorough description of this picture for somebody who cannot see it.",),
        ),
        _SYSTEM,
    ),
    "reasoning": Prompt(
        "reasoning",
        "reasoning-1",
        (
            (
                "Think of one question about this picture that takes a conclusion to answer: a cause, a purpose, what comes next, what sets it "
                "apart from similar things. The question itself does not give away what is seen. Answer it step by step from what can be "
                f"seen. {_JSON}",
            ),
        ),
        _SYSTEM,
        "dialogue",
    ),
}
"""For general vision-language models."""


def _taught(kind: str) -> Prompt:
    """The questions that the bundled model was taught; of those of a conversation each picture gets three in turn."""
    asked = QUESTIONS[kind]
    wordings: tuple[tuple[str, ...], ...] = tuple((q,) for q in asked)
    if kind == "conversation":
        wordings = tuple(tuple(asked[(first + i) % len(asked)] for i in range(3)) for first in range(len(asked)))
    return Prompt(kind, f"glyphs-{kind}-{hashlib.sha256(repr(wordings).encode()).hexdigest()[:8]}", wordings)


def prompts_for(kinds: Sequence[str], style: str) -> list[Prompt]:
    """The prompts of these kinds in a ``style``: "instruct" (any capable model) or "glyphs" (what the bundled model was taught).

    Raises:
        UserError: an unknown kind, or one asked for twice.
    """
    known = INSTRUCT
    if style == "glyphs":
        known = {k: _taught(k) for k in KINDS}
    for kind in kinds:
        if kind not in known:
            raise UserError("annotate.kinds", f"unknown kind {kind!r}", f"choose from {', '.join(known)}")
    if len(set(kinds)) != len(kinds) or not kinds:
        raise UserError("annotate.kinds", "is empty or names a kind twice", f"choose from {', '.join(known)}")
    return [known[k] for k in kinds]
