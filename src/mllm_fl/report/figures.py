"""The paper's Figures 3 and 4 from results files: curves over rounds, and confusion matrices side by side. One self-contained page each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_fl.errors import UserError
from mllm_fl.report import plots
from mllm_fl.report.document import frame, put
from mllm_fl.report.html import Markup, figure, name, paragraph, section, tag
from mllm_fl.report.results import confusion_figure
from mllm_fl.report.table import group

TITLES = {3: "Figure 3: accuracy over rounds", 4: "Figure 4: what is taken for what"}
NOTE = "The paper’s figure has no table of its values: only our runs are drawn."


def build(number: int, finals: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Write the figure as one HTML file.

    Raises:
        UserError: another number, no run that can be drawn, runs with different classes (Figure 4), matplotlib missing.
    """
    if number not in TITLES:
        raise UserError("figure", f"there is no Figure {number} to draw", "choose 3 or 4")
    drawn = _curves(finals) if number == 3 else _confusions(finals)
    body = [tag("header", tag("h1", TITLES[number])), tag("main", drawn, paragraph(NOTE, class_="note"))]
    return put(frame(TITLES[number], body), out)


def _curves(finals: Sequence[Mapping[str, Any]]) -> Markup:
    lines, legend = [], []
    for index, (arm, runs) in enumerate(group(finals).items()):
        series = [_history(run) for run in runs]
        line = plots.over_seeds(index, [s for s in series if s])
        if line is not None:
            lines.append(line)
            legend.append((index, arm))
    if not lines:
        raise UserError(
            "figure 3", "no run among the results recorded its curve", "collect runs made with this version"
        )
    svg = plots.curves(
        "figure3", lines, "Accuracy over rounds, one line per arm", unit="accuracy, %", scale=100, top=100
    )
    caption = "Test accuracy; lines: mean over seeds, bands: ± one standard deviation over seeds."
    return section("curves", "Over the rounds", plots.legend(legend), figure(svg, caption))


def _history(final: Mapping[str, Any]) -> list[tuple[int, float]]:
    history = final.get("history")
    if not isinstance(history, Mapping):
        return []
    pairs = zip(history.get("round", ()), history.get("accuracy", ()), strict=False)
    return [(int(t), float(a)) for t, a in pairs]


def _confusions(finals: Sequence[Mapping[str, Any]]) -> Markup:
    known = [f for f in finals if isinstance(f.get("last"), Mapping) and f["last"].get("confusion")]
    if not known:
        raise UserError("figure 4", "no run among the results recorded a confusion matrix", "collect finished runs")
    names = known[0]["class_names"]
    if any(f["class_names"] != names for f in known):
        raise UserError("figure 4", "the runs have different classes", "draw each results file by itself")
    pictures = [
        confusion_figure(i, arm, [run["last"]["confusion"] for run in runs], names)
        for i, (arm, runs) in enumerate(group(known).items())
    ]
    note = "Rows are the true classes, columns what they were taken for; percent of the row, last round, all seeds together."
    grid = tag("div", *pictures, class_="grid small")
    return section("confusions", "By arm", paragraph(note, class_="note"), grid, paragraph(name(f"{len(known)} runs")))
