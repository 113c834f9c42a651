"""The card of a corpus as Markdown: where it comes from, the funnel, how often it states what is not so, a sample with what a person said about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_fl.annotate import review, truth
from mllm_fl.annotate.acquire import STATES
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.quality import sheet
from mllm_fl.annotate.quality.check import read as read_raw
from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.annotate.review_server import known

TRUTHS = {
    "glyph": "rendered characters (exact scenes)",
    "shape": "drawn shapes (exact)",
    "captions": "captions by people",
    "labels": "class labels",
}


def card(folder: Path, title: str, sample: int = 12, notes: Sequence[str] = ()) -> str:
    """The Markdown text. ``sample``: how many records of the review sample are shown; ``notes``: paragraphs that a machine cannot know.

    Raises:
        UserError: no corpus, or what was checked or decided is about another state of it.
    """
    corpus = Corpus.open(folder)
    raw = read_raw(folder)
    sheets = sheet.read(folder, raw.images, raw.ids)
    head = corpus.card
    parts = [f"# {title}", *notes, _origin(corpus), _coverage(head.get("coverage")), _kinds(head.get("kinds"))]
    if sheets is None:
        parts.append("## Funnel\n\nNot checked (`mllm-fl corpus check`).")
    else:
        parts.append(
            "## Funnel\n\nEach item falls at the first check that it fails; *fails in all* counts it at every check that it fails. Nothing was removed from the corpus; an export leaves the fallen behind."
        )
        parts += [_funnel("Pictures", sheets[0]), _funnel("Records", sheets[1])]
    parts += [
        _hallucination(head.get("hallucination")),
        _probes((head.get("quality") or {}).get("probes")),
        _clip((head.get("quality") or {}).get("clip")),
    ]
    found = review.estimate(folder)
    parts.append(
        f"## Review\n\n{_first(found.text()) if found else 'Nobody has reviewed a sample yet (`mllm-fl review`)'}."
    )
    parts.append(_sample(corpus, sheets[1] if sheets else None, sample))
    return "\n\n".join(p for p in parts if p) + "\n"


def _first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _origin(corpus: Corpus) -> str:
    head = corpus.card
    rows = [("source", head.get("source")), ("annotator", head.get("model")), ("parameters", head.get("parameters")), ("pictures", f"{len(corpus.images):,}"), ("records", f"{len(corpus.records):,}"),
            *((f"SHA-256 of {k}", v) for k, v in corpus.digests().items())]  # fmt: skip
    return table(["", ""], [[k, v] for k, v in rows if v not in (None, "", {})])


def _coverage(found: Any) -> str:
    if not isinstance(found, Mapping) or not found:
        return ""
    states = {s: int(found[s]) for s in STATES if found.get(s)}
    said = ", ".join(f"{n:,} {s}" for s, n in states.items())
    return f"## Coverage\n\n{found.get('wanted') or sum(states.values()):,} pictures were wanted: {said}."


def _kinds(found: Any) -> str:
    if not isinstance(found, Mapping) or not found:
        return ""
    rows = [
        [
            k,
            v.get("prompt", ""),
            f"{v.get('ok', 0):,}",
            f"{v.get('failed', 0):,}",
            _number(v.get("completion_tokens")),
            _number(v.get("seconds")),
        ]
        for k, v in found.items()
    ]
    return "## Kinds of text\n\n" + table(
        ["kind", "prompt", "records", "failed", "tokens out", "seconds of answering"], rows
    )


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def _funnel(title: str, found: sheet.Sheet) -> str:
    rows = [
        [s.check, f"{s.reached:,}", f"{s.fell:,}", f"{s.failed:,}", f"{s.not_checked:,}", s.why_not]
        for s in found.funnel()
    ]
    rows.append(["**kept**", f"**{len(found.kept()):,}**", "", "", "", ""])
    return f"### {title}\n\n" + table(["check", "reached", "fell here", "fails in all", "not checked", "why not"], rows)


def _hallucination(found: Any) -> str:
    if not found:
        return "## What is stated and is not so\n\nNot checked: nothing is known about the pictures."
    rows = [
        [TRUTHS.get(r["truth"], r["truth"]), r["kind"], f"{r['records']:,}", f"{r['decidable']:,}", f"{r['statements']:,}", _share(r["false_share"]),
         f"{_share(r['records_false_share'])} ({100 * r['low']:.1f}–{100 * r['high']:.1f})"] for r in found
    ]  # fmt: skip
    return (
        "## What is stated and is not so\n\n*False statements*: share of the statements that the truth decides (CHAIR's instance rate). *Records with one*: share of the records that make such a statement, "
        "with its 95 % interval (Wilson). Of captions by people it is an upper bound: what nobody mentioned may still be there.\n\n"
        + table(
            ["truth", "kind", "records", "decidable", "statements", "false statements", "records with one (%)"], rows
        )
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _probes(found: Any) -> str:
    if not found:
        return "## Yes/no probes\n\nNot checked: nobody was asked."
    rows = [
        [TRUTHS.get(r["truth"], r["truth"]), f"{r['asked']:,}", f"{_share(r['accuracy'])} ({100 * r['low']:.1f}–{100 * r['high']:.1f})", f"{r['f1']:.2f}", _share(r["yes"]), f"{r['no_answer']:,}",
         ", ".join(f"{w} {100 * v:.0f} %" for w, v in r["by_way"].items())] for r in found["kinds"]
    ]  # fmt: skip
    stood = found.get("stood_by") or {}
    said = (
        f"\n\nAsked about a thing that it had named, the annotator denied it in {stood.get('denied', 0):,} of {stood.get('asked', 0):,} records."
        if stood.get("asked")
        else ""
    )
    return (
        "## Yes/no probes (POPE-style)\n\n"
        + table(["truth", "asked", "right", "F1 of yes", "says yes", "no answer", "right by way"], rows)
        + said
    )


def _clip(found: Any) -> str:
    if not found:
        return ""
    return f"CLIP score: median {found['median']:.3f} over {found['records']:,} records; those below {found['edge']:.3f} (percentile {found['percentile']:g}) fell."


def _sample(corpus: Corpus, found: sheet.Sheet | None, count: int) -> str:
    if count < 1:
        return ""
    decisions, truths = review.read(corpus.folder), truth.load(corpus.folder, corpus.images)
    drawn = review.sample(corpus.records, count)
    rows = []
    for r in drawn:
        decision = decisions.get(r.id)
        why = "; ".join(f"{c}: {w}" for c, w in found.reasons(r.id).items()) if found else ""
        rows.append(
            [r.id, r.kind, _said(r), known(truths.get(r.image, {})), why or "–", decision.decision if decision else ""]
        )
    return f"## Sample\n\nThe first {len(drawn)} of the review's random order.\n\n" + table(
        ["record", "kind", "what was said", "known", "fails", "review"], rows
    )


def _said(record: Record) -> str:
    return " ".join(
        f"*{t.text.replace(IMAGE, '').strip()}*"
        if t.speaker == "human" and record.kind == "conversation"
        else t.text.strip()
        for t in record.turns
        if t.speaker == "gpt" or record.kind == "conversation"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what would break a cell or act as markup is escaped."""
    lines = [list(head), ["---"] * len(head), *[[_cell(x) for x in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = " ".join(str("" if value is None else value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
