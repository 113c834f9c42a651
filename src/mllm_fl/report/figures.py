"""Figures as inline SVG, drawn by matplotlib's object interface; nothing global is touched. Colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_fl.errors import UserError
from mllm_fl.report.load import RunView, by_arm
from mllm_fl.report.table import plain

INK = "#123456"  # stands for the page's text colour, and is replaced by it in the SVG
CYCLE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a8a00",
    "#7f7f7f",
)  # Okabe and Ito, for colour-blind readers


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("report", "needs matplotlib", "pip install 'mllm-fl[report]'") from e
    return Figure(figsize=(width, height), facecolor="none", layout="constrained")


def svg(figure: Any, label: str, prefix: str) -> str:
    """The figure as an SVG element that names itself to screen readers and takes the page's text colour."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)  # several figures share the page
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if size:
        text = text.replace(size.group(0), 'width="100%"', 1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(label)}" ', 1)


def _attribute(text: str) -> str:
    return plain(text).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """A name as matplotlib may draw it: no mathematics, not endless."""
    shown = plain(text).replace("$", "＄")
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _style(axes: Any) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    for item in (axes.xaxis.label, axes.yaxis.label, axes.title):
        item.set_color(INK)
        item.set_fontsize(9)


def curves(views: Sequence[RunView]) -> str:
    """Test accuracy over rounds: a line per arm (mean over seeds), a band of one standard deviation where there are seeds."""
    figure = _figure(7.2, 3.6)
    axes = figure.add_subplot()
    for color, (arm, runs) in zip(_colors(), by_arm(views).items(), strict=False):
        series = [{r["round"]: r["accuracy"] for r in v.rounds if r.get("accuracy") is not None} for v in runs]
        rounds = sorted(set.intersection(*map(set, series))) if series else []
        if not rounds:
            continue
        values = 100 * np.array([[s[t] for t in rounds] for s in series])
        mean = values.mean(0)
        axes.plot(rounds, mean, color=color, label=_plain(arm), linewidth=1.6)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            axes.fill_between(rounds, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy, %")
    _style(axes)
    legend = axes.legend(frameon=False, fontsize=8, loc="best")
    for text in legend.get_texts():
        text.set_color(INK)
    return svg(figure, "Test accuracy over rounds, one line per arm", "curves")


def _colors() -> list[str]:
    return list(CYCLE) * 20


def group_bars(views: Sequence[RunView]) -> str:
    """Accuracy of many, medium and few classes after the last round: a bar per arm, the mean over seeds."""
    arms = by_arm(views)
    figure = _figure(7.2, 3.0)
    axes = figure.add_subplot()
    width = 0.8 / max(len(arms), 1)
    for i, (color, (arm, runs)) in enumerate(zip(_colors(), arms.items(), strict=False)):
        for j, group in enumerate(("many", "medium", "few")):
            values = [v.final["last"].get(group) for v in runs]
            if any(v is None for v in values):
                continue
            height = 100 * sum(values) / len(values)
            axes.bar(
                j + i * width - 0.4 + width / 2,
                height,
                width * 0.92,
                color=color,
                label=_plain(arm) if j == 0 else None,
            )
            if len(arms) <= 6:
                axes.annotate(
                    f"{height:.0f}",
                    (j + i * width - 0.4 + width / 2, height),
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    color=INK,
                )
    axes.set_xticks(range(3), ["many", "medium", "few"])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 108)
    _style(axes)
    legend = axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    for text in legend.get_texts():
        text.set_color(INK)
    return svg(figure, "Accuracy of many, medium and few classes per arm", "groups")


def confusions(views: Sequence[RunView]) -> list[tuple[str, str]]:
    """(arm, SVG): share of each true class (rows) that was taken for each class (columns), summed over seeds."""
    out = []
    for i, (arm, runs) in enumerate(by_arm(views).items()):
        counts = [np.array(v.final["last"]["confusion"], dtype=float) for v in runs if v.final["last"].get("confusion")]
        if not counts:
            continue
        total = np.sum(counts, axis=0)
        share = total / np.maximum(total.sum(1, keepdims=True), 1)
        out.append(
            (arm, _matrix(share, f"Confusion matrix of {arm}", "true class", "predicted", f"confusion{i}", "Blues"))
        )
    return out


def _matrix(values: np.ndarray, label: str, rows: str, columns: str, prefix: str, cmap: str) -> str:
    figure = _figure(3.0, 3.0 * max(0.5, min(2.0, values.shape[0] / values.shape[1])))
    axes = figure.add_subplot()
    axes.imshow(values, cmap=cmap, vmin=0, vmax=max(float(values.max()), 1e-9), interpolation="nearest", aspect="auto")
    if max(values.shape) <= 20:
        axes.set_xticks(range(values.shape[1]))
        axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    _style(axes)
    return svg(figure, label, prefix)


def holdings(description: Mapping[str, Any]) -> str:
    """Who holds what: clients (rows) by classes (columns), darker is more images (square root, so that the tail is seen)."""
    counts = np.array([c["histogram"] for c in description["clients"]], dtype=float)
    return _matrix(np.sqrt(counts), "Images of each class at each client", "client", "class", "holdings", "Greens")
