"""The seam between the annotator and whatever answers: an endpoint, a local model, a stub in a test."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from mllm_fl.annotate.ledger import Entry

Deliver = Callable[[list[tuple[int, Entry]]], None]
"""Takes answers as they come: the request's position and what came of it."""


@dataclass(frozen=True)
class Request:
    """One picture and what is asked about it: ``image`` is uint8 (3, h, w); each question is asked on its own."""

    image: Tensor
    questions: tuple[str, ...]
    system: str = ""


class Backend(Protocol):
    """Answers requests. ``model`` names it in the ledger, ``batch_size`` is how many requests it likes at a time."""

    model: str
    batch_size: int

    def parameters(self) -> dict[str, Any]:
        """Everything besides the model and the question that an answer depends on, as plain values."""
        ...

    def answer(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Answer all; every request is delivered exactly once. One that fails is delivered with ``error`` set.

        Raises:
            UserError: nothing can be answered at all: endpoint down, unknown model, wrong key. What was delivered stays.
        """
        ...


def picture(image: Tensor) -> Image.Image:
    """A tensor uint8 (3, h, w) as an RGB picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def png(image: Tensor, max_side: int | None = None) -> bytes:
    """PNG bytes of a tensor uint8 (3, h, w), scaled down first if a side is longer than ``max_side`` pixels."""
    drawn = picture(image)
    if max_side is not None and max(drawn.size) > max_side:
        drawn.thumbnail((max_side, max_side))
    out = io.BytesIO()
    drawn.save(out, "PNG")
    return out.getvalue()
