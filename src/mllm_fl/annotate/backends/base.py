"""The seam between the annotator and whatever answers: an endpoint, a local model, a stub in a test."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from mllm_fl.annotate.ledger import Entry
from mllm_fl.data.decode import PIXEL_LIMIT, to_rgb

Deliver = Callable[[list[tuple[int, Entry]]], None]
"""Takes answers as they come: the request's position and what came of it."""

_SENT_AS_IT_IS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Request:
    """One picture and what is asked about it; each question is asked on its own.

    ``image``: the encoded file, as bytes or a path. ``schema``: the JSON schema of the answers. ``done``: the answers to the first
    questions, which are there already. ``fault``: why the answer of the last attempt was not usable.
    """

    image: bytes | Path
    questions: tuple[str, ...]
    system: str = ""
    schema: dict[str, Any] | None = None
    done: tuple[str, ...] = ()
    fault: str = ""


class Backend(Protocol):
    """Answers requests. ``model`` names it in the ledger, ``batch_size`` is how many requests it likes at a time.

    A backend with an attribute ``streams = True`` is given one long iterable, from which it takes the next request when it has a
    hand free: what is taken counts as in flight. Others get lists of at most ``batch_size``.
    """

    model: str
    batch_size: int

    def parameters(self) -> dict[str, Any]:
        """Everything besides the model and the question that an answer depends on, as plain values."""
        ...

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        """Answer all; every request is delivered exactly once. One that fails is delivered with ``error`` set.

        Of a request with several questions, the first answers may be delivered before, with ``partial`` set and their own bill;
        the last delivery then holds all texts, and the bill of the rest.

        Raises:
            UserError: nothing can be answered at all: endpoint down, unknown model, wrong key. What was delivered stays.
        """
        ...


def picture(image: Tensor) -> Image.Image:
    """A tensor uint8 (3, h, w) as an RGB picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def png(image: Tensor) -> bytes:
    """PNG bytes of a tensor uint8 (3, h, w)."""
    out = io.BytesIO()
    picture(image).save(out, "PNG")
    return out.getvalue()


def encoded(image: bytes | Path, max_side: int | None = None) -> tuple[str, bytes]:
    """(media type, bytes) of a picture as it is sent. Raises ``ValueError`` with the reason when it cannot be read.

    A PNG, JPEG or WebP file whose sides are at most ``max_side`` pixels goes as it is. Anything else is turned upright, scaled down and
    encoded again: JPEG (quality 90) stays JPEG, the rest becomes PNG.
    """
    kind, content, ready = as_it_is(image, max_side)
    return (kind, content) if ready else encoded_again(kind, content, max_side)


def as_it_is(image: bytes | Path, max_side: int | None = None) -> tuple[str, bytes, bool]:
    """(media type, bytes, True) of a file that goes as it is, else (its format, bytes, False): only its head is looked at."""
    try:
        content = image if isinstance(image, bytes) else image.read_bytes()
        with Image.open(io.BytesIO(content)) as found:
            kind, upright = str(found.format), found.getexif().get(0x0112, 1) == 1
            small = max_side is None or max(found.size) <= max_side
            if found.width * found.height > PIXEL_LIMIT:
                raise ValueError(f"{found.width}x{found.height} pixels is more than {PIXEL_LIMIT:,}")
    except FileNotFoundError:
        raise ValueError("the picture is missing") from None
    except Image.DecompressionBombError:
        raise ValueError("far too many pixels") from None
    except (OSError, SyntaxError):
        raise ValueError("the picture cannot be read") from None
    ready = small and upright and kind in _SENT_AS_IT_IS
    return (_SENT_AS_IT_IS[kind] if ready else kind), content, ready


def encoded_again(kind: str, content: bytes, max_side: int | None) -> tuple[str, bytes]:
    """(media type, bytes) of the picture, upright and scaled down; this takes its time."""
    drawn = to_rgb(content)
    if max_side is not None and max(drawn.size) > max_side:
        drawn.thumbnail((max_side, max_side))
    out = io.BytesIO()
    if kind == "JPEG":
        drawn.save(out, "JPEG", quality=90)
        return "image/jpeg", out.getvalue()
    drawn.save(out, "PNG")
    return "image/png", out.getvalue()
