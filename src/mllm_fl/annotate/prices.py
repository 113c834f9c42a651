"""What answers cost: the user's price table, and how many tokens a question is likely to take before anybody has counted them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_fl.errors import UserError
from mllm_fl.toml import build, read_toml

TYPICAL = {"caption": 20, "conversation": 180, "detail": 150, "reasoning": 220, "label": 10}
"""Tokens of an answer by kind where the ledger has none yet: our guess, capped by ``max_tokens``."""
_OVERHEAD = 12  # tokens of roles and separators of one request: a guess


@dataclass(frozen=True)
class Price:
    """``input`` and ``output``: per million tokens, in any one currency. ``batch``: what a batch's tokens cost, as a factor."""

    input: float
    output: float
    batch: float = 0.5

    def __post_init__(self) -> None:
        if min(self.input, self.output, self.batch) < 0:
            raise UserError("price", "is negative", "give the price per million tokens")

    def cost(self, prompt_tokens: float, completion_tokens: float, *, batch: bool = False) -> float:
        """The price of so many tokens in and out."""
        factor = self.batch if batch else 1.0
        return factor * (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def price_of(table: str | None, model: str) -> Price | None:
    """The price of ``model`` in the TOML file ``table`` (one table per model: ``["gpt-4o-mini"] input = 0.15, output = 0.6``).

    None without a file: nothing is known, and a spend cap is refused.

    Raises:
        UserError: the file cannot be read, or does not name the model.
    """
    if table is None:
        return None
    found = read_toml(Path(table))
    if model not in found or not isinstance(found[model], dict):
        names = ", ".join(found) or "nothing"
        raise UserError(
            table, f"has no price for {model!r}", f'it names {names}; add ["{model}"] input = …, output = …'
        )
    return build(Price, found[model], table, f"{model}.")


def text_tokens(text: str) -> int:
    """About how many tokens a text has: one per four letters of English."""
    return math.ceil(len(text) / 4)


def image_tokens(width: int, height: int, max_side: int | None = None) -> int:
    """About how many tokens a picture is: 85, and 170 for each tile of 512 x 512 pixels (OpenAI's rule for GPT-4-class models)."""
    scale = min(1.0, (max_side or math.inf) / max(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return 85 + 170 * tiles


def request_tokens(system: str, questions: Sequence[str], image: int) -> int:
    """Tokens in of one record: each of its questions is sent with the picture (``image`` tokens) and the instructions."""
    return sum(text_tokens(system) + text_tokens(q) + image + _OVERHEAD for q in questions)
