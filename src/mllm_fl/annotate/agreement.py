"""How far annotations of rendered pictures agree with their scenes: every attribute that a text states is looked up in the truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_fl.annotate.records import Record
from mllm_fl.data.glyphs import DIGIT_NAMES

_PATTERNS = {
    "name": rf"\b(?:letter\s+['\"]?([a-z])\b|({'|'.join(DIGIT_NAMES)})\b|digit\s+['\"]?([0-9])\b)",
    "kind": r"\b(digit|letter)\b",
    "weight": r"\b(thin|medium|bold)\b",
    "posture": r"\b(?:lean\w*\s+(?:to\s+the\s+)?(left|right)|(upright))\b",
    "proportion": r"\b(narrow|normal|wide)\b",
}
"""Attribute of a scene -> the words that state it. What a text states first counts: later names may be comparisons."""


def stated(text: str) -> dict[str, str]:
    """The value of each attribute that the text states, in the scene's words."""
    found: dict[str, str] = {}
    for attribute, pattern in _PATTERNS.items():
        match = re.search(pattern, text, re.IGNORECASE)
        if match:
            value = next(g for g in match.groups() if g).lower()
            if attribute == "name":
                value = value.upper() if match.group(1) else DIGIT_NAMES[int(value)] if value.isdigit() else value
            found[attribute] = value
    return found


def agreement(records: Sequence[Record], scenes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind: records, how many of them state something false, and per attribute how often it is stated and how often rightly.

    ``scenes``: image path -> scene as plain values. Each answer of a record is read by itself.
    """
    out: dict[str, dict[str, Any]] = {}
    for record in records:
        scene = scenes.get(record.image)
        if scene is None:
            continue
        row = out.setdefault(record.kind, {"records": 0, "false": 0, "attributes": {}})
        claims = [claim for text in record.answers for claim in stated(text).items()]
        right = [str(scene[a]) == value for a, value in claims]
        row["records"] += 1
        row["false"] += not all(right)
        for (a, _), ok in zip(claims, right, strict=True):
            cell = row["attributes"].setdefault(a, {"stated": 0, "right": 0})
            cell["stated"] += 1
            cell["right"] += ok
    return out
