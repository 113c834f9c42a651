"""The sections with results: the comparison, curves, class groups, confusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllm_fl.report import plots
from mllm_fl.report.html import (
    Cell,
    Markup,
    details,
    figure,
    join,
    listing,
    name,
    paragraph,
    percent_cell,
    section,
    table,
    tag,
)
from mllm_fl.report.reading import Found, Run
from mllm_fl.report.summary import points, scores
from mllm_fl.report.table import SCORES, Value, compare, footnotes, headers, mean_sd, number, percent

GROUPS = ("many", "medium", "few")


def comparison(found: Found) -> Markup:
    """The table, with the rule of selection in its header."""
    rows = compare([run.final for run in found.runs])
    titles = headers(rows)
    rules = {
        "last": "last round", "mean_last": f"{titles['mean_last']} rounds", "ema": "EMA of rounds", "max": "max, selected on test",
        **{g: f"{g}, last round" for g in GROUPS},
    }  # fmt: skip
    window = "last rounds" if titles["mean_last"] == "mean last" else None
    rules["mean_last"] = f"mean of the {window}" if window else rules["mean_last"]
    body = [[name(r.arm), Cell(len(r.seeds), len(r.seeds)), *(percent_cell(r.values[k]) for k in SCORES)] for r in rows]
    notes = [*footnotes(rows)[:-1], "max: the best round was selected on test images; an upper bound, not a result."]
    grid = table("Test accuracy by arm, %", ["arm", "seeds", *(rules[k] for k in SCORES)], body)
    return section("comparison", "Comparison", grid, *(paragraph(n, class_="note") for n in notes), _alignment(found))


def _alignment(found: Found) -> Markup:
    """Before and after the alignment of the last round, with the images it used."""
    body = []
    for arm in found.arms:
        before = [_before(run) for run in arm.runs]
        images = {_images(run) for run in arm.runs if run.final.get("align") and _was_aligned(run)}
        if not images:
            continue
        after = scores(arm, "last", "accuracy")
        gains = [a - b for a, b in zip(after, before, strict=True) if a is not None and b is not None]
        change = mean_sd(gains) if len(gains) == len(before) else None
        body.append([
            name(arm.name), join(sorted(images), "; "), percent_cell(mean_sd(before)), percent_cell(mean_sd(after)),
            Cell(points(change), None if change is None else change.mean, None if change is None else change.sd),
        ])  # fmt: skip
    if not body:
        return Markup("")
    head = ["arm", "alignment images", "before, %", "after, %", "change"]
    return table("What the alignment of the last round did to the aggregated model", head, body)


def _was_aligned(run: Run) -> bool:
    """Whether stage 3 was on; a control may have dealt D_align's images to the clients instead."""
    stages = run.final.get("stages")
    return not isinstance(stages, Mapping) or bool(stages.get("align", True))


def _before(run: Run) -> float | None:
    value = number(run.final, "accuracy_before_align")
    return number(run.final, "before_align", "accuracy") if value is None else value


def _images(run: Run) -> str:
    align = run.final.get("align")
    return f"{align.get('images', '–')} of {align.get('source', '–')}" if isinstance(align, Mapping) else "–"


def over_rounds(found: Found) -> Markup:
    """Curves: overall and by class frequency, and the clients' loss."""

    def lines(value: Callable[[Mapping[str, Any]], float | None]) -> list[plots.Line]:
        out = []
        for arm in found.arms:
            series = [
                [(int(row["round"]), v) for row in run.rounds if "round" in row and (v := value(row)) is not None]
                for run in arm.runs
            ]
            line = plots.over_seeds(arm.index, [s for s in series if s])
            if line is not None:
                out.append(line)
        return out

    pictures = []
    for key, words in (("accuracy", "all test images"), *((g, f"{g} classes") for g in GROUPS)):
        drawn = lines(lambda row, key=key: number(row, key))  # type: ignore[misc]
        if drawn:
            svg = plots.curves(
                f"c-{key}",
                drawn,
                f"Test accuracy over rounds, {words}, one line per arm",
                unit="accuracy, %",
                scale=100,
                top=100,
            )
            pictures.append(figure(svg, f"Accuracy, {words}"))
    losses = lines(lambda row: number(row, "train_loss"))
    if losses:
        svg = plots.curves("c-loss", losses, "Training loss over rounds, one line per arm", unit="loss")
        pictures.append(figure(svg, "Loss on the clients' images while they train"))
    if not pictures:
        return Markup("")
    names = plots.legend([(arm.index, arm.name) for arm in found.arms if any(run.rounds for run in arm.runs)])
    many = any(len(arm.runs) > 1 for arm in found.arms)
    note = "Lines: mean over seeds; bands: ± one standard deviation over seeds." if many else "One seed: no band."
    return section(
        "rounds", "Over the rounds", names, tag("div", *pictures, class_="grid"), paragraph(note, class_="note")
    )


def by_frequency(found: Found) -> Markup:
    """Many, medium and few; and class by class."""
    first = found.arms[0].first.final
    parts = first.get("groups") if isinstance(first.get("groups"), Mapping) else {}
    values = [(arm.index, [mean_sd(scores(arm, "last", g)) for g in ("accuracy", *GROUPS)]) for arm in found.arms]
    parts_named = [join([f"{g}: ", _names(parts.get(g), found.class_names)]) for g in GROUPS if parts and parts.get(g)]
    label = "Accuracy in the last round, bars per arm: " + "; ".join(
        f"{arm.name} " + ", ".join(f"{g} {percent(v)}" for g, v in zip(("all", *GROUPS), row, strict=True))
        for arm, (_, row) in zip(found.arms, values, strict=True)
    )
    svg = plots.bars("groups", ("all", *GROUPS), values, label)
    legend = plots.legend([(arm.index, arm.name) for arm in found.arms], dashes=False)
    rule = [f"Groups: {parts['rule']}."] if parts and parts.get("rule") else []
    seeds = " Error bars: ± one standard deviation over seeds." if any(len(a.runs) > 1 for a in found.arms) else ""
    caption = f"Accuracy in the last round; a group's is the mean over its classes.{seeds}"
    return section(
        "frequency", "Frequent and rare classes", legend, figure(svg, caption),
        paragraph(*rule, class_="note") if rule else "", listing(parts_named) if parts_named else "",
        details("Accuracy class by class", _per_class(found)),
    )  # fmt: skip


def _names(indices: Any, names: Sequence[str]) -> Markup:
    known = [i for i in indices if isinstance(i, int) and 0 <= i < len(names)]
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return join([join((name(names[i]) for i in known[:20]), ", "), more])


def _per_class(found: Found) -> Markup:
    counts = found.arms[0].first.final.get("class_counts") or [None] * len(found.class_names)
    body = []
    for c, label in enumerate(found.class_names):
        cells = []
        for arm in found.arms:
            rows = [run.final["last"].get("per_class") for run in arm.runs]
            cells.append(percent_cell(mean_sd([number({"x": r[c]}, "x") if r else None for r in rows])))
        body.append([name(label), Cell(f"{counts[c]:,}", counts[c]) if isinstance(counts[c], int) else None, *cells])
    head = ["class", "training images", *(name(arm.name) for arm in found.arms)]
    return table("Accuracy by class, last round, %", head, body)


def confusions(found: Found) -> Markup:
    """Matrices side by side, each summed over its arm's seeds."""
    pictures = []
    for arm in found.arms:
        known = [t for t in (run.final["last"].get("confusion") for run in arm.runs) if t]
        if known:
            pictures.append(confusion_figure(arm.index, arm.name, known, found.class_names))
    if not pictures:
        return Markup("")
    note = "Rows are the true classes, columns what they were taken for; percent of the row, last round, all seeds together."
    grid = tag("div", *pictures, class_="grid small")
    return section("confusions", "What is taken for what", paragraph(note, class_="note"), grid)


def confusion_figure(index: int, arm: str, tables: Sequence[Any], names: Sequence[str]) -> Markup:
    """One arm's matrix, the sum of its runs' ``tables``, with its accuracy and most frequent error."""
    total = [[sum(t[i][j] for t in tables) for j in range(len(row))] for i, row in enumerate(tables[0])]
    errors = _errors(total, names)
    label = f"Confusion matrix of {arm}. Most frequent errors: {'; '.join(errors) or 'none'}"
    svg = plots.matrix(
        f"m{index}", total, names, names, label, row_title="true class", column_title="taken for", share=True
    )
    score = Value(sum(total[i][i] for i in range(len(total))) / max(1, sum(map(sum, total))))
    often = join(["; most often ", errors[0]]) if errors else ""
    return figure(svg, tag("strong", name(arm)), f": {percent(score)} % right", often)


def _errors(total: Sequence[Sequence[int]], names: Sequence[str], count: int = 5) -> list[str]:
    pairs = [(n, i, j) for i, row in enumerate(total) for j, n in enumerate(row) if i != j and n > 0]
    return [
        f"{names[i]} taken for {names[j]} ({n:,})" for n, i, j in sorted(pairs, key=lambda p: (-p[0], p[1:]))[:count]
    ]
