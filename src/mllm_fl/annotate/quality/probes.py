"""Yes/no questions about things that are and that are not in a picture, after POPE (Li et al. 2023, arXiv:2305.10355, §4).

Half of the questions name a thing that is there; the others one that is not: drawn evenly ("random"), by how often it is seen elsewhere ("popular"), or
the one that is seen most often together with what is there ("adversarial"). Known questions (easy-VQA) are asked in their own words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from mllm_fl.annotate.hallucination import wilson
from mllm_fl.annotate.objects import everyday
from mllm_fl.annotate.records import Record
from mllm_fl.annotate.truth import SHAPES, kind_of
from mllm_fl.events import Event, Progress, silent
from mllm_fl.seeds import numpy_stream

QUESTION = "Is there {} in the picture? Answer yes or no."
VERSION = "probe-1"
WAYS = ("popular", "random", "adversarial")
"""How a thing that is not there is chosen, in turn."""
Asker = Callable[[Sequence[tuple[Path, str]]], list[str | None]]
"""Answers (picture, question) pairs, None where there is no answer."""


@dataclass(frozen=True)
class Probe:
    """One question. ``expected``: whether "yes" is right; ``way``: present, random, popular, adversarial or known."""

    image: str
    question: str
    expected: bool
    way: str
    truth: str


def article(thing: str) -> str:
    """``"oak tree"`` -> ``"an oak tree"``."""
    return f"{'an' if thing[:1] in 'aeiou' else 'a'} {thing}"


def meaning(answer: str | None) -> bool | None:
    """What an answer says: yes, no, or neither."""
    found = re.match(r"\W*(yes|no)\b", answer or "", re.IGNORECASE)
    return found.group(1).lower() == "yes" if found else None


def things(truth: Mapping[str, Any]) -> list[str]:
    """The things that a truth says are there."""
    kind = kind_of(truth)
    if kind == "captions":
        return sorted({x for c in truth["captions"] for x in everyday().named(c)})
    if kind == "labels":
        return list(truth["labels"])
    if kind == "shape":
        return [truth["shape"]]
    if kind == "glyph":
        scene = truth["glyph"]
        return [f"{scene['kind']} {scene['name']}".lower()]
    return []


def draw(truths: Mapping[str, Mapping[str, Any]], count: int, seed: int = 0) -> list[Probe]:
    """Up to ``count`` probes of each kind of truth, the same for the same corpus and seed."""
    rng = numpy_stream(seed, "probes")
    by_kind: dict[str, list[str]] = {}
    for image, truth in truths.items():
        if things(truth):
            by_kind.setdefault(str(kind_of(truth)), []).append(image)
    out = []
    for kind, images in sorted(by_kind.items()):
        seen = Counter(t for i in images for t in things(truths[i]))
        names = list(SHAPES.things) if kind == "shape" else sorted(seen)
        weight = np.array([seen[n] for n in names], dtype=float)
        together = Counter(pair for i in images for pair in permutations(things(truths[i]), 2))
        for n in range(count):
            image = images[int(rng.integers(len(images)))]
            there = things(truths[image])
            known = [q for q in truths[image].get("qa") or () if q["answer"] in ("yes", "no")]
            if known and n % 4 == 0:
                asked = known[int(rng.integers(len(known)))]
                out.append(Probe(image, asked["question"].capitalize(), asked["answer"] == "yes", "known", kind))
                continue
            absent = np.array([name not in there for name in names], dtype=float)
            if n % 2 or not absent.any():
                out.append(
                    Probe(image, QUESTION.format(article(there[int(rng.integers(len(there)))])), True, "present", kind)
                )
                continue
            way = WAYS[n // 2 % len(WAYS)]
            beside = absent * np.array([sum(together[t, name] for t in there) for name in names], dtype=float)
            if way == "adversarial" and not beside.any():
                way = "popular"  # nothing was ever seen beside these things
            if way == "adversarial":
                p = (beside == beside.max()).astype(float)
            else:
                p = absent if way == "random" or not (absent * weight).any() else absent * weight
            name = names[int(rng.choice(len(names), p=p / p.sum()))]
            out.append(Probe(image, QUESTION.format(article(name)), False, way, kind))
    return out


def measure(
    folder: Path, truths: Mapping[str, Mapping[str, Any]], count: int, ask: Asker, progress: Progress = silent
) -> dict[str, Any]:
    """Ask, and score per kind of truth: accuracy with its interval, precision, recall and F1 of "yes", the share of "yes", and what was no answer."""
    asked = draw(truths, count)
    progress(Event("check", 0, len(asked), "yes/no probes"))
    answers = [meaning(a) for a in ask([(folder / p.image, p.question) for p in asked])] if asked else []
    return {
        "question": VERSION,
        "kinds": [
            score(kind, [(p, a) for p, a in zip(asked, answers, strict=True) if p.truth == kind])
            for kind in sorted({p.truth for p in asked})
        ],
    }


def score(kind: str, found: Sequence[tuple[Probe, bool | None]]) -> dict[str, Any]:
    """One row; an answer that is neither yes nor no is wrong."""
    right = sum(a is p.expected for p, a in found)
    yes, hits = sum(a is True for _, a in found), sum(a is True and p.expected for p, a in found)
    wanted = sum(p.expected for p, _ in found)
    precision, recall = hits / yes if yes else 0.0, hits / wanted if wanted else 0.0
    low, high = wilson(right, len(found))
    ways = {w: [a is p.expected for p, a in found if p.way == w] for w in ("present", *WAYS, "known")}
    return {
        "truth": kind, "asked": len(found), "accuracy": right / len(found), "low": low, "high": high, "precision": precision, "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0, "yes": yes / len(found),
        "no_answer": sum(a is None for _, a in found), "by_way": {w: sum(v) / len(v) for w, v in ways.items() if v},
    }  # fmt: skip


def stand_by(
    folder: Path, records: Sequence[Record], count: int, ask: Asker, progress: Progress = silent, seed: int = 0
) -> tuple[dict[str, str], set[str]]:
    """(records of which the annotator denies a thing that it named, with the thing; the records that were asked about)."""
    named = [(r, x) for r in records if r.kind != "conversation" for x in everyday().named(" ".join(r.answers))[:1]]
    chosen = sorted(numpy_stream(seed, "stand by").permutation(len(named))[:count].tolist())
    progress(Event("check", 0, len(chosen), "does it stand by what it named"))
    answers = (
        ask([(folder / named[i][0].image, QUESTION.format(article(named[i][1]))) for i in chosen]) if chosen else []
    )
    denied = {
        named[i][0].id: f"named {article(named[i][1])}, and says it is not there when asked"
        for i, a in zip(chosen, answers, strict=True)
        if meaning(a) is False
    }
    return denied, {named[i][0].id for i, a in zip(chosen, answers, strict=True) if meaning(a) is not None}
