"""Small corpora for tests: pictures that differ, records that are fine, and hostile texts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_fl.annotate.records import Record, Turn

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "a\u202eb\u200b",
    "| pipe `tick` " + "x" * 300,
)


def png(n: int, side: int = 32) -> bytes:
    """A picture of its own for every n: noise that is smooth enough to survive a resize."""
    coarse = np.random.RandomState(n).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def record(id: str, image: str, *answers: str, kind: str = "caption") -> Record:
    """A record with these answers."""
    turns: list[Turn] = []
    for i, answer in enumerate(answers):
        turns += [Turn("human", "<image>\nWhat is it?" if i == 0 else "And then?"), Turn("gpt", answer)]
    return Record(id, image, tuple(turns), kind)


def corpus(
    folder: Path,
    records: Sequence[Record | dict[str, Any]],
    pictures: dict[str, bytes] | None = None,
    truth: dict[str, Any] | None = None,
) -> Path:
    """A corpus folder; pictures that are not given are made."""
    named = list(dict.fromkeys(r.image if isinstance(r, Record) else str(r.get("image")) for r in records))
    for n, image in enumerate(named):
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((pictures or {}).get(image) or png(n))
    raw = [r.to_json() if isinstance(r, Record) else r for r in records]
    (folder / "records.json").write_text(json.dumps(raw), encoding="utf-8")
    if truth:
        (folder / "truth.jsonl").write_text(
            "".join(json.dumps({"image": i, "truth": t}) + "\n" for i, t in truth.items())
        )
    return folder
