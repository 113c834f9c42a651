"""Tables in Markdown documents: what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is generated, the rest is written by people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError


def filled(text: str, name: str, content: str, place: object) -> str:
    """The document ``text`` with ``content`` between the two marks of ``name``; ``place``: its name in an error.

    Raises:
        UserError: a mark is missing, there are several, or they stand in the wrong order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        problem = f"needs {begin} once and {end} once after it"
        raise UserError(place, problem, "add the two lines where the table belongs")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def fill(page: Path, tables: Mapping[str, str], check: bool = False) -> bool:
    """Put ``tables``, by the names of their marks, into ``page``, whole or not at all; was it stale? With ``check`` nothing is written.

    Raises:
        UserError: the page cannot be read, or lacks a mark.
    """
    try:
        old = new = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(page, f"cannot be read: {e}") from e
    for name, content in tables.items():
        new = filled(new, name, content, page)
    if new != old and not check:
        write_atomic(page, new.encode())
    return new != old
