"""A picture's conversation as token ids and labels: only what the model says is predicted, never a question, never a picture.

The form is the teacher's own, for LLaVA-1.5 that of Vicuna v1: ``USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: ...``, one sequence
for all turns; or, as in LLaVA's own first stage, the plain one: the picture, then what is said about it, without questions or roles.
Which tokens are predicted follows from the character positions of the answers, so that no tokenizer's habits at the seams matter. A token
without characters of its own (a word mark, a byte of a letter) is predicted where an answer begins or goes on, not where it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.teacher.llava import Blueprint

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One conversation: ``ids`` and ``labels`` of equal length, int64; label -100 where nothing is predicted."""

    ids: Tensor
    labels: Tensor

    @property
    def predicted(self) -> int:
        """Number of tokens that the loss is a mean over."""
        return int((self.labels != IGNORED).sum())


def encode(
    teacher: Blueprint,
    turns: Sequence[tuple[str, str]],
    max_tokens: int,
    place: str,
    form: Literal["chat", "plain"] = "chat",
) -> Sample:
    """The sample of a conversation of (question, answer) turns; the first question holds ``<image>``. Cut at ``max_tokens``.

    Raises:
        UserError: image tokens != features of the teacher, nothing left to predict, a picture's token to be predicted, or text that the
            tokenizer would read as one of its special tokens.
    """
    _refuse_special(teacher, turns, place)
    tokenizer = teacher.processor.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            teacher.name,
            "its tokenizer tells no character positions (a slow tokenizer)",
            "save it with a tokenizer.json",
        )
    picture, (before, between, after) = teacher.picture, teacher.family.roles
    end = after.format(eos=tokenizer.eos_token)
    lead = " " if between.endswith(":") else ""
    text, spans = picture if form == "plain" else "", []
    for question, answer in turns:
        text += f"{before}{question.replace('<image>', picture)}{between}" if form == "chat" else ""
        begin = len(text)
        text += f"{lead}{answer}{end}"
        spans.append((begin, len(text.rstrip("\n"))))
    begins = teacher.family.types != "prefix"  # there the start token stands behind the picture
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=begins)
    ids = torch.tensor(out["input_ids"][:max_tokens])
    said = [any(a <= start < b and end <= b for a, b in spans) for start, end in out["offset_mapping"]]
    labels = torch.where(torch.tensor(said[:max_tokens]), ids, IGNORED)
    sample = Sample(ids, labels)
    check(teacher, sample, place)
    return sample


def _refuse_special(teacher: Blueprint, turns: Sequence[tuple[str, str]], place: str) -> None:
    special = dict.fromkeys([*teacher.processor.tokenizer.all_special_tokens, teacher.placeholder])
    for i, (question, answer) in enumerate(turns):
        for who, text in (("question", question.replace("<image>", "", int(i == 0))), ("answer", answer)):
            found = next((s for s in special if s in text), None)
            if found is not None:
                raise UserError(
                    place,
                    f"the {who} of turn {i + 1} contains {found!r}, which the teacher reads as a special token",
                    "remove it from the text, or the record",
                )


def check(teacher: Blueprint, sample: Sample, place: str) -> None:
    """Refuse a sample that would train nothing or the wrong thing; see :func:`encode`."""
    pictures = sample.ids == teacher.image_token
    if int(pictures.sum()) != teacher.place.tokens:
        raise UserError(
            place, f"its text holds {int(pictures.sum())} image tokens, the teacher gives {teacher.place.tokens} features",
            "raise pretrain.max_tokens, and keep one <image> in the first question",
        )  # fmt: skip
    if bool((sample.labels[pictures] != IGNORED).any()):
        raise UserError(place, "an image token carries a label", "answers must not contain <image>")
    if sample.predicted == 0:
        raise UserError(
            place,
            f"nothing to predict: all {len(sample.ids)} tokens are masked",
            "raise pretrain.max_tokens, or remove the record",
        )


def collate(samples: Sequence[Sample], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels), each (n, longest), padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in samples], batch_first=True, padding_value=padding)
    labels = torch.nn.utils.rnn.pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(s.ids) for s in samples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask, labels


def shown(teacher: Blueprint, sample: Sample) -> dict[str, Any]:
    """A sample for human eyes: what is given, what is to be predicted, as text; the picture's tokens as their number."""
    tokenizer = teacher.processor.tokenizer
    text = sample.ids != teacher.image_token
    given, predicted = (sample.labels == IGNORED) & text, sample.labels != IGNORED
    return {
        "image_tokens": int((~text).sum()),
        "given": tokenizer.decode(sample.ids[given]),
        "predicted": tokenizer.decode(sample.ids[predicted]),
        "tokens_given": int(given.sum()),
        "tokens_predicted": int(predicted.sum()),
    }
