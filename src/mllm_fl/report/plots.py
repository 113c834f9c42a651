"""The page's figures: curves over rounds, bars by class frequency, matrices of counts. Values in, one SVG element out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_fl.report.html import Markup, tag
from mllm_fl.report.svg import INK, LINE, SOFT, TEXT, colour, dash, figure, inline, plot
from mllm_fl.report.table import Value, mean_sd, plain
from mllm_fl.report.table import columns as columns_of

WIDTH = 400.0  # px: drawn as wide as a telephone's page, so that nothing shrinks there
ACCENT = (0x2B / 255, 0x6C / 255, 0xB0 / 255)  # of matrices; opacity carries the value, so it does for light and dark
NUMBERED = 12  # matrices of up to so many columns show the numbers in their cells
NAMED = 20  # and of up to so many the names beside them


@dataclass(frozen=True)
class Line:
    """One arm's curve: per round a mean, and the standard deviation over seeds where there are several. ``index``: the arm's."""

    index: int
    rounds: Sequence[int]
    values: Sequence[Value]


def over_seeds(index: int, series: Sequence[Sequence[tuple[int, float]]]) -> Line | None:
    """The arm's curve from (round, value) pairs, one series a seed, over the rounds that every seed has; None if there are none."""
    tables = [dict(s) for s in series]
    rounds = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
    values = [mean_sd([t[r] for t in tables]) for r in rounds]
    return Line(index, rounds, [v for v in values if v is not None]) if rounds else None


def curves(
    key: str, lines: Sequence[Line], label: str, *, unit: str, scale: float = 1.0, top: float | None = None
) -> Markup:
    """Values over rounds; a band of ± one standard deviation where there are several seeds."""
    drawn = figure(WIDTH, 240)
    axes = plot(drawn)
    for line in lines:
        mean = np.array([v.mean for v in line.values]) * scale
        look: dict[str, Any] = {"color": colour(line.index), "linewidth": 1.8 if len(lines) <= 8 else 1.0}
        if dash(line.index):
            look["dashes"] = dash(line.index)
        if len(mean) == 1:
            look["marker"] = "o"
        axes.plot(line.rounds, mean, **look)
        if all(v.sd is not None for v in line.values):
            sd = np.array([v.sd for v in line.values], dtype=float) * scale
            axes.fill_between(
                line.rounds,
                mean - sd,
                mean + sd,
                color=colour(line.index),
                alpha=0.16 if len(lines) <= 4 else 0.09,
                linewidth=0,
            )
    axes.set_xlabel("round")
    axes.set_ylabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if top is not None:
        axes.set_ylim(0, top)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    return inline(drawn, key, label)


def bars(key: str, groups: Sequence[str], arms: Sequence[tuple[int, Sequence[Value | None]]], label: str) -> Markup:
    """Accuracy in percent, a bar per arm in each group, with ± one standard deviation where there are several seeds."""
    drawn = figure(WIDTH, 240)
    axes = plot(drawn)
    width = 0.84 / max(len(arms), 1)
    for place, (index, values) in enumerate(arms):
        for g, value in enumerate(values):
            x = g - 0.42 + (place + 0.5) * width
            if value is None:
                axes.text(x, 1, "–", ha="center", color=SOFT, size=TEXT)
                continue
            sd = None if value.sd is None else 100 * value.sd
            bar_look = {"elinewidth": 1, "ecolor": SOFT, "capsize": min(3.0, 40 * width)}
            axes.bar(x, 100 * value.mean, 0.9 * width, yerr=sd, color=colour(index), error_kw=bar_look)
            if len(arms) <= 4:
                axes.text(
                    x, 100 * value.mean + (sd or 0) + 1.5, f"{100 * value.mean:.0f}", ha="center", color=INK, size=9
                )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, max(100.0, axes.get_ylim()[1]))
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    return inline(drawn, key, label)


def matrix(
    key: str, counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], label: str,
    *, row_title: str, column_title: str, share: bool,
) -> Markup:  # fmt: skip
    """A table of counts as shades. ``share``: each row by its sum (percent); otherwise by the logarithm, so that few is seen beside many."""
    table = np.array(counts, dtype=float).reshape(len(rows), len(columns))
    if share:
        shade = table / np.maximum(table.sum(1, keepdims=True), 1)
    else:
        shade = np.log1p(table) / max(math.log1p(float(table.max(initial=0))), 1e-9)
    side = min(WIDTH, 300.0 if len(columns) <= NUMBERED else 340.0)
    row = max(17.0, 24.0 if share else 17.0) if len(rows) <= 40 else max(2.0, 480 / len(rows))
    left, bottom = 24 + _room(rows, turned=False), 24 + _room(columns, turned=True)
    drawn = figure(side, max(80.0, min(row * len(rows), side if share else 1000.0)) + bottom + 8)
    axes = plot(drawn, left, bottom)
    picture = np.empty((*table.shape, 4))
    picture[..., :3] = ACCENT
    picture[..., 3] = np.clip(shade, 0, 1)
    axes.imshow(picture, interpolation="none", aspect="auto")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(LINE)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    _names(axes.xaxis, columns, turned=True)
    _names(axes.yaxis, rows, turned=False)
    numbers = _numbers(axes, table, shade, share) if len(columns) <= NUMBERED and len(rows) <= 2 * NAMED else Markup("")
    return inline(drawn, key, label, numbers)


def _numbers(axes: Any, table: np.ndarray, shade: np.ndarray, share: bool) -> Markup:
    """What stands in the cells, as text of our own: matplotlib takes half a millisecond to lay out each."""
    height = float(axes.figure.bbox.height)
    rows, columns = np.nonzero(table > 0)
    places = axes.transData.transform(np.column_stack([columns, rows])) if len(rows) else []
    written = []
    for i, j, (x, y) in zip(rows, columns, places, strict=True):
        text = f"{100 * shade[i, j]:.0f}" if share else f"{table[i, j]:.0f}"
        over = "on-strong" if shade[i, j] > 0.85 else None
        style = f"fill:var(--{over})" if over else None
        written.append(tag("text", text, x=f"{x:.1f}", y=f"{height - y + 3.2:.1f}", style=style))
    return tag("g", *written, style="font-size:9px;text-anchor:middle;fill:var(--ink)")


STATES = {"averaged": ACCENT, "rejected": (0.86, 0.15, 0.15), "no answer": (0.90, 0.60, 0.0)}
"""What became of an online client's round -> its colour, in light and in dark."""


def participation(key: str, states: Sequence[Sequence[str | None]], label: str) -> Markup:
    """Clients (rows) by rounds (columns): who was online and what became of it; None is offline."""
    clients, rounds = len(states), len(states[0]) if states else 0
    picture = np.zeros((clients, rounds, 4))
    for name, colour_of in STATES.items():
        there = np.array([[s == name for s in row] for row in states], dtype=bool)
        picture[there] = (*colour_of, 0.65 if name == "averaged" else 1.0)
    drawn = figure(WIDTH, min(220.0, max(60.0, 7.0 * clients)) + 44)
    axes = plot(drawn)
    axes.imshow(picture, interpolation="none", aspect="auto", extent=(0.5, rounds + 0.5, clients - 0.5, -0.5))
    axes.set_xlabel("round")
    axes.set_ylabel("client")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return inline(drawn, key, label)


def _names(axis: Any, names: Sequence[str], *, turned: bool) -> None:
    """Names at their rows or columns, or numbers here and there where there are many."""
    short = _short(names, turned)
    if not short:
        axis.get_major_locator().set_params(integer=True)
        return
    turn = turned and max(map(columns_of, short)) > 2
    axis.set_ticks(range(len(names)), short, rotation=90 if turn else 0)
    axis.set_tick_params(length=0)


def _short(names: Sequence[str], turned: bool) -> list[str]:
    """Names of at most ten letters; none where there are too many to be read."""
    if len(names) > 2 * NAMED or (turned and len(names) > NAMED):
        return []
    return [n if columns_of(n) <= 10 else n[: 9 if n.isascii() else 5] + "…" for n in map(plain, names)]


def _room(names: Sequence[str], turned: bool) -> float:
    """Px that the names need beside the axis (6.3 a letter of DejaVu Sans, which is wide)."""
    longest = max(map(columns_of, _short(names, turned)), default=3)
    return 12.0 if turned and longest <= 3 else 6.3 * longest


def legend(names: Sequence[tuple[int, str]], *, dashes: bool = True) -> Markup:
    """Which line (or, without ``dashes``, bar) is which arm, as text of the page."""
    items = []
    for index, text in names:
        gaps = ",".join(f"{d:g}" for d in dash(index)) if dashes else ""
        line = tag(
            "line",
            x1="0",
            y1="5",
            x2="26",
            y2="5",
            style=f"stroke:var(--s{index % 8});stroke-width:{3 if dashes else 10}",
            stroke_dasharray=gaps or None,
        )
        items.append(tag("li", tag("svg", line, width="26", height="10", aria_hidden="true"), tag("bdi", text)))
    return tag("ul", *items, class_="legend")
