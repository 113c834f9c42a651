"""From a matplotlib figure to inline SVG that takes its colours and its font from the page, in light and in dark."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError
from mllm_fl.report.html import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, STRONG = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0203{i:02x}" for i in range(8))
COLOURS = {INK: "ink", SOFT: "soft", LINE: "line", STRONG: "on-strong"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
"""Stand-ins that matplotlib draws with -> the page's CSS variables that take their place."""
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
TEXT = 10.0  # px, as on the page


def colour(index: int) -> str:
    """The stand-in for the colour of arm ``index``; eight, then from the beginning with the next dash."""
    return SERIES[index % len(SERIES)]


def dash(index: int) -> tuple[float, ...]:
    """Lengths of line and gap in px for arm ``index``; arms are told apart without colour too."""
    return DASHES[(index + index // len(SERIES)) % len(DASHES)]


def figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` × ``height`` px (72 to the inch, so that a point is a px).

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as New
    except ImportError as e:
        raise UserError("report", "needs matplotlib", "pip install 'mllm-fl[report]'") from e
    return New(figsize=(width / 72, height / 72), dpi=72)


def plot(drawn: Figure, left: float = 46, bottom: float = 36) -> Any:
    """One set of axes in the page's quiet style, ``left`` and ``bottom`` px from the edges: room for ticks and titles.

    The margins are given, because having matplotlib find them takes as long as drawing.
    """
    width, height = (72 * size for size in drawn.get_size_inches())
    room = (left / width, bottom / height, 1 - (left + 6) / width, 1 - (bottom + 8) / height)
    axes = drawn.add_axes(room)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=TEXT, length=3, color=LINE)
    axes.xaxis.label.set(color=SOFT, size=TEXT)
    axes.yaxis.label.set(color=SOFT, size=TEXT)
    axes.set_axisbelow(True)
    return axes


def inline(drawn: Figure, key: str, label: str, above: Markup = Markup("")) -> Markup:  # noqa: B008
    """The figure as an SVG element that says ``label`` to a screen reader; ``key`` keeps its ids apart from other figures'.

    ``above``: SVG in the figure's px, drawn over it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn.patch.set_visible(False)
    for text in drawn.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)  # type: ignore[attr-defined]  # a class may be called $x$
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing", category=UserWarning
        )  # the browser has its own fonts
        FigureCanvasSVG(drawn).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup(_tidy(out.getvalue(), key, label).removesuffix("</svg>") + above + "</svg>")


def _tidy(svg: str, key: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r"<[^>]*>", lambda m: _tag(m[0], key, used), svg)  # what stands between tags is somebody's text
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None, "matplotlib always writes a viewBox"
    size = f'viewBox="0 0 {box[1]} {box[2]}" style="max-width:{float(box[1]):g}px"'
    head = f'<svg class="plot" {size} role="img" aria-label="{escape(label)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def _tag(tag: str, key: str, used: set[str]) -> str:
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(href="|url\()#', rf"\1#{key}-", tag)
    if "base64" in tag:
        return re.sub(r"base64,\s+", "base64,", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = re.sub(r"; stroke-linejoin: miter; stroke-linecap: square", "", tag)
    return re.sub(r"#0[12]0[23][0-9a-f]{2}", lambda m: f"var(--{COLOURS[m[0]]})" if m[0] in COLOURS else m[0], tag)
