"""What can be said about an annotation without looking at its picture: refusal, truncation, leaked prompts, repetition, length, language."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from mllm_fl.annotate.prompts import INSTRUCT
from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.errors import UserError

_REFUSAL = re.compile(
    r"\b(?:i'?m sorry|i am sorry|i apologi[sz]e|as an? (?:ai|language model|artificial)|i(?: am|'m) (?:unable|not able)|i can(?:no|')t (?:see|view|help|assist|describe|identify|provide|access|process)"
    r"|i do(?: not|n't) have (?:access|the ability)|unable to (?:view|see|process|access|describe) (?:the |this |any )?(?:image|picture|photo)|no image (?:was|has been|is) (?:provided|attached)"
    r"|please (?:provide|upload|attach) (?:an?|the) (?:image|picture|photo)|against (?:my|our) (?:guidelines|policy|policies))",
    re.IGNORECASE,
)
_LEAK = re.compile(
    r"(?:(?i:\b(?:the|given|provided|your|these) captions?\b|\bbounding box(?:es)?\b|\bthe (?:provided|given|attached) (?:image|picture|description)s?\b|\b(?:system|user) prompt\b|\byour (?:request|instructions?)\b)"
    r"|\b(?:USER|ASSISTANT|SYSTEM)\s*:|<\|[a-z_]+\|>|\[/?INST\]|</?s>|```|\"(?:question|answer)\"\s*:|\bQuestion\s*:|===)"
)
_OPEN_ENDS = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "but",
        "of",
        "in",
        "on",
        "at",
        "with",
        "for",
        "to",
        "from",
        "by",
        "is",
        "are",
        "was",
        "that",
        "which",
        "because",
        "as",
        "its",
        "his",
        "her",
        "their",
        "into",
        "near",
    ]
)
_ENDS = tuple(".!?…\"'”’)。！？")
SAME = 20  # records with one and the same answer that are let through in any case
SHARED = 8  # words in a row that an answer may not have in common with the instruction
LANGUAGE_SURE, LANGUAGE_LETTERS = (
    0.9,
    20,
)  # below this probability, or with fewer letters, nothing is said about the language


def refusal(record: Record) -> str | None:
    """Why the model seems to have refused, or None."""
    found = next((m for t in record.answers if (m := _REFUSAL.search(t))), None)
    return f"says {found.group()!r}" if found else None


def truncation(record: Record) -> str | None:
    """An answer that stops in the middle: no end mark after several words, unless it is a short phrase such as a caption."""
    for text in record.answers:
        words = text.split()
        last = words[-1].lower() if words else ""
        if text.rstrip().endswith(_ENDS):
            continue
        short = len(words) <= 20 and not re.search(r"[.!?]\s", text)
        if not short or last.rstrip(",;:-–") in _OPEN_ENDS or text.rstrip().endswith((",", ";", ":", "-", "–", "(")):
            return f"ends with {' '.join(words[-3:])!r}"
    return None


def leakage(record: Record) -> str | None:
    """Words of the prompt, of the dialogue's form or of a source that the model was not to mention."""
    for text in record.answers:
        if found := _LEAK.search(text):
            return f"contains {found.group()!r}"
        for gram in _grams(_words(text), SHARED):
            if gram in _instructions():
                return f"repeats the instruction: {' '.join(gram)!r}"
    return None


def repetition(record: Record) -> str | None:
    """A phrase of four words three times or more within an answer and over a third of it, or one answer to all questions."""
    for text in record.answers:
        words = _words(text)
        grams = Counter(_grams(words, 4))
        gram, times = grams.most_common(1)[0] if grams else ((), 0)
        if times >= 3 and 4 * times > len(words) / 3:
            return f"{' '.join(gram)!r} {times} times"
        if any(a == b == c == d for a, b, c, d in zip(words, words[1:], words[2:], words[3:])):
            return "one word four times in a row"
    long = [t.strip().lower() for t in record.answers if len(t.split()) > 2]
    if len(long) > 1 and len(set(long)) == 1:
        return f"one answer to all {len(long)} questions"
    return None


def sameness(records: Sequence[Record]) -> dict[str, str]:
    """Record id -> why, of records whose whole answer stands under more than 1 % of the pictures of their kind, and at least 20: it says nothing about any of them."""
    said = Counter((r.kind, r.answers) for r in records)
    of_kind = Counter(r.kind for r in records)
    times = {key: n for key, n in said.items() if n >= SAME and n > 0.01 * of_kind[key[0]]}
    return {
        r.id: f"the same answer {times[r.kind, r.answers]:,} times" for r in records if (r.kind, r.answers) in times
    }


def length(record: Record, least: int, most: int) -> str | None:
    """The words of all answers together, held against bounds."""
    n = sum(len(t.split()) for t in record.answers)
    return f"{n} words" if not least <= n <= most else None


def language(record: Record, wanted: str) -> str | None:
    """Another language than ``wanted`` (ISO 639-1), where the detector is sure; raises ``ValueError`` when the text is too short to tell."""
    text = " ".join(record.answers).replace(IMAGE, "")
    if sum(c.isalpha() for c in text) < LANGUAGE_LETTERS:
        raise ValueError(f"fewer than {LANGUAGE_LETTERS} letters")
    found, sure = detector()(text)
    return f"{found} with probability {sure:.2f}" if found != wanted and sure >= LANGUAGE_SURE else None


@lru_cache(maxsize=1)
def detector() -> Callable[[str], tuple[str, float]]:
    """py3langid's classifier: text -> (language, probability).

    Raises:
        UserError: not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("language", "needs the package py3langid", "pip install 'mllm-fl[quality]'") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def classify(text: str) -> tuple[str, float]:
        found, sure = identifier.classify(text)
        return str(found), float(sure)

    return classify


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@lru_cache(maxsize=1)
def _instructions() -> frozenset[tuple[str, ...]]:
    texts = [t for p in INSTRUCT.values() for t in (p.system, *(q for v in p.variants for q in v))]
    return frozenset(g for t in texts for g in _grams(_words(t), SHARED))
