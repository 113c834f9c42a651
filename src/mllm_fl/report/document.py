"""The page as a whole: its parts in order, the style and the script inside it, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from mllm_fl import __version__
from mllm_fl.atomic import write_atomic
from mllm_fl.errors import UserError
from mllm_fl.report import context, results
from mllm_fl.report.costs import costs
from mllm_fl.report.html import Markup, escape, join, tag
from mllm_fl.report.measures import measures
from mllm_fl.report.reading import Found, read
from mllm_fl.report.summary import lead
from mllm_fl.report.timeline import timeline


def write(runs: Sequence[Path], out: Path, title: str, corpus: Path | None) -> Path:
    """See :func:`mllm_fl.report.build`."""
    return put(page(read(runs), title, corpus), out)


def put(text: str, out: Path) -> Path:
    """Write a page whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomic(out, text.encode("utf-8"))
    except OSError as e:
        raise UserError(out, f"the page cannot be written: {e.strerror}", "choose another place with --out FILE") from e
    return out


def page(found: Found, title: str, corpus: Path | None) -> str:
    """The HTML text."""
    parts = [
        results.comparison(found),
        results.over_rounds(found),
        measures(found),
        results.by_frequency(found),
        results.confusions(found),
        context.holdings(found),
        _samples(corpus) if corpus is not None else Markup(""),
        timeline(found),
        costs(found),
        context.differences(found),
        context.reproduce(found),
        context.unfinished(found),
    ]
    return frame(title, [
        tag("a", "To the comparison", href="#comparison", class_="skip"),
        tag("header", tag("h1", title), lead(found), tag("nav", _contents(parts), aria_label="Contents")),
        tag("main", *parts),
        tag("footer", tag("p", f"Written by mllm-fl {__version__}; the numbers are those of the run folders' final.json.")),
    ])  # fmt: skip


def frame(title: str, body: Sequence[object]) -> str:
    """A whole document around the body's parts, with style and script inside it."""
    return f'<!doctype html>\n<html lang="en">\n{_head(title)}\n<body>\n{join(body)}\n<script>{_asset("page.js")}</script>\n</body>\n</html>\n'


def _samples(corpus: Path) -> Markup:
    """The annotated images; what reads a corpus is imported only where there is one, for it takes torch with it."""
    from mllm_fl.report.samples import samples

    return samples(corpus)


def _contents(parts: Sequence[Markup]) -> Markup:
    links = [m for part in parts for m in re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', part)]
    return tag("ul", *(tag("li", tag("a", Markup(text), href=f"#{key}")) for key, text in links))


def _head(title: str) -> str:
    """No request may leave the page, and no script may run but ours, whatever a class is called."""
    script = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    return "\n".join([
        "<head>", '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">', f"<title>{escape(title)}</title>",
        f"<style>{_asset('page.css')}</style>", "</head>",
    ])  # fmt: skip


def _asset(file: str) -> str:
    return (files("mllm_fl.report") / file).read_text(encoding="utf-8")
