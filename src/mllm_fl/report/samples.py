"""A few annotated images of stage 1's corpus: the picture, what was said about it, and the truth where the picture was rendered."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_fl.annotate.agreement import stated
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.data.decode import to_rgb
from mllm_fl.errors import UserError
from mllm_fl.report.html import Cell, Markup, join, listing, name, paragraph, section, table, tag
from mllm_fl.runs import read_rows

COUNT, SIDE = 6, 160  # images, and px of the longer side to which larger ones are reduced
TRUTHS = ("name", "kind", "weight", "posture", "proportion")


def samples(folder: Path) -> Markup:
    """The section about a corpus folder.

    Raises:
        UserError: not a corpus, or a picture that cannot be decoded.
    """
    corpus = Corpus.open(folder)
    scenes = {str(row.get("image")): row for row in read_rows(folder / "scenes.jsonl") if isinstance(row, dict)}
    step = max(1, len(corpus.images) // COUNT)
    chosen = corpus.images[::step][:COUNT]
    cards = [
        _card(corpus, image, scenes.get(image), [r for r in corpus.records if r.image == image]) for image in chosen
    ]
    who = corpus.card.get("model")
    said = join(
        [
            f"{len(corpus.records):,} records about {len(corpus.images):,} images",
            " by " if who else "",
            name(who or ""),
            ".",
        ]
    )
    parts = [
        paragraph(said, f" Every {step}th image is shown." if step > 1 else ""),
        _agreement(corpus.card.get("agreement")),
    ]
    return section("samples", "Annotated images", *parts, tag("div", *cards, class_="grid"))


def _card(corpus: Corpus, image: str, scene: Mapping[str, Any] | None, records: Sequence[Record]) -> Markup:
    turns = []
    for record in records:
        turns.append(tag("dt", record.kind or "record", class_="kind"))
        for turn in record.turns:
            text = turn.text.replace(IMAGE, "").strip()
            wrong = _false(text, scene) if turn.speaker == "gpt" and scene else []
            mark = tag("small", f" ✗ {', '.join(wrong)}", class_="wrong") if wrong else ""
            turns.append(
                tag("dd", tag("q" if turn.speaker == "human" else "span", name(text)), mark, class_=turn.speaker)
            )
    truth = ""
    if scene:
        known = [f"{key} {scene[key]}" for key in TRUTHS if key in scene]
        truth = paragraph(tag("strong", "Truth: "), ", ".join(known) or "not known", class_="truth")
    alt = f"open image, in truth: {scene.get('kind', '')} {scene.get('name', '')}" if scene else f"open image {image}"
    return tag(
        "article",
        tag("div", _picture(corpus.folder / image, alt), truth, class_="head"),
        tag("dl", *turns),
        class_="card",
    )


def _false(text: str, scene: Mapping[str, Any]) -> list[str]:
    """The attributes of which the text states something else than the scene."""
    return [a for a, value in stated(text).items() if a in scene and str(scene[a]) != value]


def _picture(path: Path, alt: str) -> Markup:
    try:
        drawn = to_rgb(path)
    except ValueError as e:
        raise UserError(path, str(e), "restore it, or leave the corpus out of the report") from None
    drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    drawn.save(out, "PNG")
    source = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    small = "pixel" if max(drawn.size) <= 64 else None
    return tag("img", src=source, alt=alt, width="96", class_=small)


def _agreement(found: Any) -> Markup:
    """How often the annotator was right where the truth is known, from the corpus's card."""
    if not isinstance(found, Mapping) or not found:
        return Markup("")
    false = [
        f"{kind}: {row.get('false', 0):,} of {row.get('records', 0):,} records state something false"
        for kind, row in found.items()
    ]
    kinds = list(found)
    attributes = list(dict.fromkeys(a for row in found.values() for a in row.get("attributes", {})))
    body = []
    for a in attributes:
        cells = [found[k].get("attributes", {}).get(a) for k in kinds]
        body.append([a, *(_right(c) for c in cells)])
    grid = table("Statements that agree with the scene, by attribute", ["attribute", *map(name, kinds)], body)
    return join([paragraph("Held against the scenes they were rendered from:"), listing(false), grid])


def _right(cell: Mapping[str, int] | None) -> Cell | None:
    if not cell or not cell.get("stated"):
        return None
    share = cell["right"] / cell["stated"]
    return Cell(f"{100 * share:.1f} % of {cell['stated']:,}", share)
