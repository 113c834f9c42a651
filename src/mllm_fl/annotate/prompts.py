"""What a model is asked, kind by kind: our own words, for models that see the picture. A changed word means a new version.

Four kinds, after LLaVA (arXiv:2304.08485, §3): a brief **caption** (what CC-595K has), a **conversation** of several turns,
a **detail**ed description, and **reasoning** beyond what is seen; and a **label** out of a list of the user's. LLaVA's prompts fed captions and boxes to a model that sees nothing;
open images have neither, so these ask about the picture itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm_fl.annotate import schema
from mllm_fl.annotate.records import IMAGE, Record, Turn, validate
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.questions import QUESTIONS

KINDS = ("caption", "conversation", "detail", "reasoning", "label")

_SYSTEM = (
    "You describe photographs and drawings for a training set. Say only what can be seen; if something cannot be made out, leave it out. "
    "Write plain English without lists, headings, or remarks about yourself, the request, or the quality of the file."
)


@dataclass(frozen=True)
class Prompt:
    """One kind of annotation.

    ``variants``: wordings, one of which each picture gets; a wording is one or more questions, each asked on its own about the
    picture. ``form``: "plain": question and answer become the record's turns. "dialogue": the answer itself is JSON that holds
    question-answer pairs, which become the turns. "label": JSON that holds one of ``labels``.
    """

    kind: str
    version: str
    variants: tuple[tuple[str, ...], ...]
    system: str = ""
    form: Literal["plain", "dialogue", "label"] = "plain"
    labels: tuple[str, ...] = ()

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for plain text."""
        return schema.schema(self.form, self.labels)

    def questions(self, image: str) -> tuple[str, ...]:
        """The wording for the picture with this SHA-256: the same one every time."""
        return self.variants[int(image[:12], 16) % len(self.variants)]

    def record(self, id: str, image: str, questions: Sequence[str], texts: Sequence[str]) -> Record:
        """The record that these answers make. Raises ``ValueError`` with the reason when they make none."""
        if len(texts) != len(questions):
            raise ValueError(f"{len(texts)} answers to {len(questions)} questions")
        pairs = list(zip(questions, texts, strict=True))
        if self.form == "dialogue":
            pairs = schema.dialogue(texts[0])
        elif self.form == "label":
            pairs = [(_LABEL, schema.label(texts[0], self.labels))]
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


_JSON = 'Reply with JSON only: {"turns": [{"question": "...", "answer": "..."}]}.'
_LABEL = "Which one of the known labels fits this picture best?"

INSTRUCT = {
    "caption": Prompt(
        "caption",
        "caption-1",
        (("Say in one short sentence what this picture shows.",), ("Give this picture a brief caption.",)),
        _SYSTEM,
    ),
    "conversation": Prompt(
        "conversation",
        "conversation-2",
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
        "reasoning-2",
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


def _label(labels: Sequence[str]) -> Prompt:
    """The closed question; its version changes with the list."""
    if len(labels) < 2 or len(set(labels)) != len(labels) or not all(x.strip() for x in labels):
        raise UserError(
            "annotate.labels", "the kind 'label' needs two different labels or more", 'labels = ["cat", "dog"]'
        )
    asked = (
        f"Which one of these labels fits this picture best: {', '.join(labels)}? "
        'Reply with JSON only: {"label": "..."}, spelt as in the list.'
    )
    digits = hashlib.sha256(repr(tuple(labels)).encode()).hexdigest()[:8]
    return Prompt("label", f"label-1-{digits}", ((asked,),), _SYSTEM, "label", tuple(labels))


def prompts_for(kinds: Sequence[str], style: str, labels: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of these kinds in a ``style``: "instruct" (any capable model) or "glyphs" (what the bundled model was taught).

    ``labels``: the closed list of the kind "label", which the bundled model was not taught.

    Raises:
        UserError: an unknown kind, one asked for twice, a kind without its labels.
    """
    known = {k: _taught(k) for k in INSTRUCT} if style == "glyphs" else INSTRUCT
    if "label" in kinds and style != "glyphs":
        known = known | {"label": _label(labels)}
    for kind in kinds:
        if kind not in known:
            problem = f"{'the bundled model was not taught' if kind in KINDS else 'unknown kind'} {kind!r}"
            raise UserError("annotate.kinds", problem, f"choose from {', '.join(known)}")
    if len(set(kinds)) != len(kinds) or not kinds:
        raise UserError("annotate.kinds", "is empty or names a kind twice", f"choose from {', '.join(known)}")
    return [known[k] for k in kinds]
