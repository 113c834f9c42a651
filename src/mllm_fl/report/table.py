"""The comparison table of finished runs: for the terminal, for Markdown, and as values for the HTML page.

Runs of one arm are one row: mean and sample standard deviation over their seeds. What a run did not record is "–".
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"
SCORES = {  # column name -> path in final.json
    "last": ("last", "accuracy"),
    "mean_last": ("mean_last", "mean"),
    "ema": ("ema", "accuracy"),
    "max": ("max", "accuracy"),
    "many": ("last", "many"),
    "medium": ("last", "medium"),
    "few": ("last", "few"),
}
COSTS = {"bytes_up": ("bytes_up",), "bytes_down": ("bytes_down",), "seconds": ("seconds", "total")}


@dataclass(frozen=True)
class Value:
    """A mean and a sample standard deviation (None: nothing to take it over)."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Row:
    """One arm. ``values`` holds the columns of SCORES (fractions) and COSTS (bytes, seconds); None where unknown.

    ``rounds``: what "the last rounds" of ``mean_last`` are, 20 in our runs; None where the run has no such mean. ``aligned_once``: only
    ``last`` and the groups are the aligned model's, the numbers over rounds those of the rounds before. ``d_align``: on what images stage 3
    worked, in words; None without it.
    """

    arm: str
    seeds: tuple[int, ...]
    values: Mapping[str, Value | None]
    rounds: int | None = None
    aligned_once: bool = False
    d_align: str | None = None


def number(final: Mapping[str, Any], *path: str) -> float | None:
    """The finite number at a path of nested dicts, or None."""
    value: Any = final
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean_sd(values: Sequence[float | None]) -> Value | None:
    """Mean and sample standard deviation; None as soon as one value is unknown."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    if len(known) == 1:
        return Value(mean)
    return Value(mean, math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1)))


def group(finals: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The finals by arm, in the order in which the arms first appear.

    Two runs with one arm name and one seed are not two seeds: if their configurations differ, each stands alone, named by
    its hash; if they are the same run, it counts once. Arms of several experiments are told apart by the experiment's name.
    """
    unique = list(
        {(_text(f, "experiment"), _text(f, "arm"), f.get("seed"), _text(f, "config_hash")): f for f in finals}.values()
    )
    experiments = {_text(f, "experiment") for f in unique}
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for f in unique:
        name = _text(f, "arm") or _text(f, "name") or MISSING
        arms.setdefault(f"{_text(f, 'experiment')}: {name}" if len(experiments) > 1 else name, []).append(f)
    out: dict[str, list[Mapping[str, Any]]] = {}
    for name, runs in arms.items():
        if len({f.get("seed") for f in runs}) < len(runs):
            out |= {f"{name} [{f.get('config_hash')}]": [f] for f in runs}
        else:
            out[name] = runs
    return out


def compare(finals: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per arm of :func:`group`. With one seed ``mean_last`` carries the deviation over its rounds."""
    return [_row(name, runs) for name, runs in group(finals).items()]


def _row(arm: str, group: list[Mapping[str, Any]]) -> Row:
    values = {key: mean_sd([number(f, *path) for f in group]) for key, path in (SCORES | COSTS).items()}
    mean_last = values["mean_last"]
    if len(group) == 1 and mean_last is not None:
        values["mean_last"] = Value(mean_last.mean, number(group[0], "mean_last", "sd"))
    windows = {number(f, "mean_last", "rounds") or number(f, "mean_last", "n") for f in group}
    window = windows.pop() if len(windows) == 1 else None
    seeds = tuple(sorted(f["seed"] for f in group if isinstance(f.get("seed"), int)))
    once = any(f.get("curve") == "unaligned" for f in group)
    asked = list(dict.fromkeys(words for f in group if (words := alignment_images(f)) is not None))
    return Row(arm, seeds, values, None if window is None else int(window), once, "; ".join(asked) or None)


def alignment_images(final: Mapping[str, Any]) -> str | None:
    """D_align of a run in words: how many images, whence, in-domain or not, and what a control did with them; None without it."""
    align = final.get("align")
    if not isinstance(align, Mapping):
        return None
    source = str(align.get("source", MISSING))
    known = {"glyphs": False, "leftover": True}  # of records that do not say it themselves
    inside = align.get("in_domain", next((v for k, v in known.items() if k in source), None))
    domain = "in-domain: not said" if inside is None else "in-domain" if inside else "not in-domain"
    size = f"{align.get('images', MISSING)} images of {source} ({domain})"
    done = {"alone": ", and no client", "clients": ", dealt to the clients"}
    return size + done.get(str(align.get("control")), "")


def alignment_notes(rows: Sequence[Row]) -> list[str]:
    """A line for each D_align among the rows, with the arms that use it."""
    by_images: dict[str, list[str]] = {}
    for r in rows:
        if r.d_align is not None:
            by_images.setdefault(plain(r.d_align), []).append(plain(r.arm))
    return [f"Alignment images of {', '.join(arms)}: {images}." for images, arms in by_images.items()]


def _text(final: Mapping[str, Any], key: str) -> str:
    value = final.get(key)
    return "" if value is None else str(value)


def percent(value: Value | None, *, sd: bool = True) -> str:
    """A fraction as "54.8 ± 3.1" or "54.8", in percent."""
    if value is None:
        return MISSING
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.sd:.1f}" if sd and value.sd is not None else "")


def plain(text: str) -> str:
    """The text without characters that steer a terminal, turn the reading direction, or cannot be written as UTF-8."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in text
    )


_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def headers(rows: Sequence[Row]) -> dict[str, str]:
    """Column titles of SCORES for these rows."""
    windows = {r.rounds for r in rows if r.rounds is not None}
    mean_last = f"mean last {windows.pop()}" if len(windows) == 1 else "mean last"
    return {
        "last": "last",
        "mean_last": mean_last,
        "ema": "EMA",
        "max": "max*",
        "many": "many",
        "medium": "medium",
        "few": "few",
    }


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the numbers are: unit, deviation, seeds, and how the maximum was chosen."""
    counts = sorted({len(r.seeds) for r in rows})
    lines = ["Accuracy in % on the test images; many, medium, few: mean over that group's classes, last round."]
    if not counts or counts[-1] <= 1:
        lines.append(
            "One seed. ± is the standard deviation over the evaluated rounds among the last ones, not over seeds."
        )
    else:
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"{seeds} seeds: mean ± sample standard deviation over seeds.")
        if counts[0] <= 1:
            lines.append("Where there is one seed, ± of the mean of the last rounds is over those rounds.")
    once = [plain(r.arm) for r in rows if r.aligned_once]
    if once:
        lines.append(
            f"Aligned once, after the last round ({', '.join(once)}): last and the groups are the aligned model's, "
            "the mean over rounds, EMA and max those of the unaligned rounds."
        )
    return [
        *lines,
        *alignment_notes(rows),
        "* The best round is selected on test images: an upper bound, not a result.",
    ]


def to_text(rows: Sequence[Row], width: int = 80) -> str:
    """The table for a terminal, at most ``width`` columns; an arm whose name is too long for its column has a line of its own."""
    titles = headers(rows)
    head = [
        "seeds",
        *(t.replace("mean last", "mean").replace(" ", "") if k == "mean_last" else t for k, t in titles.items()),
    ]
    cells = [[str(len(r.seeds)), *(percent(r.values[k]).replace(" ", "") for k in SCORES)] for r in rows]
    sizes = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    room = width - sum(sizes) - len(sizes)
    names = [plain(r.arm) for r in rows]
    longest = max([3, *map(columns, names)])
    apart = longest > room
    label = max(3, min(room, longest)) if not apart else max(0, min(room, 3))
    lines = [_pad("arm"[:label], label) + _cells(head, sizes)]
    for name, row in zip(names, cells, strict=True):
        if apart:
            lines.append(_clip(name, width))
        lines.append(_pad("" if apart else name, label) + _cells(row, sizes))
    return "\n".join([*lines, *_wrapped(footnotes(rows), width)])


def _cells(cells: Sequence[str], sizes: Sequence[int]) -> str:
    return "".join(" " + c.rjust(n) for c, n in zip(cells, sizes, strict=True))


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    import textwrap

    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False)]


def columns(text: str) -> int:
    """How many columns of a terminal the text takes: two for wide letters, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * max(0, width - columns(text))


def _clip(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    while columns(text) >= width:
        text = text[:-1]
    return text + "…"


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, with its footnotes as a last paragraph."""
    titles = headers(rows)
    lines = [
        "| " + " | ".join(["arm", "seeds", *(t.replace("*", "\\*") for t in titles.values())]) + " |",
        "|:---" + "|---:" * (len(titles) + 1) + "|",
    ]
    lines += [
        "| " + " | ".join([markdown_cell(r.arm), str(len(r.seeds)), *(percent(r.values[k]) for k in SCORES)]) + " |"
        for r in rows
    ]
    notes = "".join("\\" + c if c in "*<>[]`" else c for c in " ".join(footnotes(rows)))
    return "\n".join([*lines, "", notes])


def markdown_cell(text: str) -> str:
    """Text as one cell of a Markdown table, or as a line of its own."""
    return "".join("\\" + c if c in "\\`*_{}[]()<>#!|~&$" else c for c in plain(text))
