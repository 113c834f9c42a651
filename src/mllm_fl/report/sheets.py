"""A sheet of text cells as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io

from mllm_fl.report.paper import Sheet
from mllm_fl.report.table import markdown_cell, plain

FORMATS = ("markdown", "csv", "latex")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$",
}  # fmt: skip


def render(sheet: Sheet, form: str) -> str:
    """The sheet as text that ends in a newline."""
    return {"markdown": _markdown, "csv": _csv, "latex": _latex}[form](sheet)


def _markdown(sheet: Sheet) -> str:
    lines = [f"### {markdown_cell(sheet.title)}", ""]
    lines.append("| " + " | ".join(map(_plain_cell, sheet.head)) + " |")
    lines.append("|:---" + "|---:" * (len(sheet.head) - 1) + "|")
    lines += ["| " + " | ".join(map(_plain_cell, row)) + " |" for row in sheet.rows]
    return "\n".join([*lines, "", " ".join(map(_plain_cell, sheet.notes)), ""])


def _plain_cell(text: str) -> str:
    """A Markdown cell whose parentheses stay as they are: without its brackets there is no link."""
    return markdown_cell(text).replace("\\(", "(").replace("\\)", ")")


def _csv(sheet: Sheet) -> str:
    out = io.StringIO()
    out.write("".join(f"# {plain(line)}\n" for line in (sheet.title, *sheet.notes)))
    csv.writer(out, lineterminator="\n").writerows([sheet.head, *sheet.rows])
    return out.getvalue()


def _latex(sheet: Sheet) -> str:
    def cell(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in plain(text))

    lines = [f"% {plain(line)}" for line in (sheet.title, *sheet.notes)]
    lines += [r"\begin{tabular}{l" + "r" * (len(sheet.head) - 1) + "}", r"\toprule"]
    body = [" & ".join(map(cell, row)) + r" \\" for row in (sheet.head, *sheet.rows)]
    return "\n".join([*lines, body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", ""])
