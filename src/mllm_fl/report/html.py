"""HTML by functions: every child and attribute that is not already markup is escaped, so a hostile name stays a name."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mllm_fl.report.table import MISSING, Value, percent, plain

VOID = frozenset(("meta", "img", "br", "col", "link"))


class Markup(str):
    """Text that is HTML already."""


def escape(value: object) -> Markup:
    """A value as HTML text, also safe inside a quoted attribute; markup passes unchanged.

    Characters that steer a terminal or turn the reading direction become U+FFFD: they could make one name look like another.
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(plain(str(value).replace("\n", " ")), quote=True))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """The parts one after another, each escaped."""
    return Markup(between.join(escape(p) for p in parts))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """One element. ``class_`` and ``for_`` lose their underscore, others become dashes; None and False leave an attribute out."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    head = f"<{name}{''.join(written)}>"
    return Markup(head if name in VOID else f"{head}{join(children)}</{name}>")


def name(text: object) -> Markup:
    """A name that somebody else chose, kept apart from the direction of the text around it."""
    return tag("bdi", text)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and for sorting and copying the exact value and its standard deviation."""

    shown: object
    value: float | None = None
    sd: float | None = None


def percent_cell(value: Value | None) -> Cell:
    """An accuracy in percent; the exact fraction stays in the cell."""
    return Cell(percent(value)) if value is None else Cell(percent(value), value.mean, value.sd)


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], *, sortable: bool = True) -> Markup:
    """A table whose first column heads its rows; it scrolls sideways inside itself where the page is narrow."""
    kept = [list(row) for row in rows]
    body = [tag("tr", tag("th", first, scope="row"), *map(_td, rest)) for first, *rest in kept]
    numeric = [any(isinstance(cell, Cell) for cell in column) for column in zip(*kept)] or [False] * len(head)
    columns = [tag("th", h, scope="col", class_="n" if n else None) for h, n in zip(head, numeric, strict=True)]
    inner = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *columns)),
        tag("tbody", *body),
        class_="sortable" if sortable else None,
    )
    return tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _td(cell: object) -> Markup:
    if not isinstance(cell, Cell):
        return tag("td", MISSING if cell is None else cell, class_="n" if cell is None else None)
    exact = None if cell.value is None else repr(cell.value)
    return tag("td", cell.shown, class_="n", data_value=exact, data_sd=None if cell.sd is None else repr(cell.sd))


def section(key: str, heading: str, *children: object) -> Markup:
    """A part of the page that can be linked to."""
    return tag("section", tag("h2", heading, id=key), *children, aria_labelledby=key)


def figure(svg: object, *caption: object) -> Markup:
    """A picture with its caption below."""
    return tag("figure", svg, tag("figcaption", *caption))


def paragraph(*children: object, class_: str | None = None) -> Markup:
    """A paragraph."""
    return tag("p", *children, class_=class_)


def details(summary: str, *children: object) -> Markup:
    """A part that is folded until it is asked for."""
    return tag("details", tag("summary", summary), *children)


def listing(items: Iterable[object]) -> Markup:
    """A bulleted list."""
    return tag("ul", *(tag("li", item) for item in items))
