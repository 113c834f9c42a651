"""How often annotations state what is not so, where the truth is known: a number per kind of truth and kind of text.

CHAIR's two measures (Rohrbach et al. 2018, arXiv:1809.02156, eq. 1-2): of the statements, the share that is false (instances), and of the records, the
share with at least one false statement (sentences), here with its Wilson interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_fl.annotate.records import Record
from mllm_fl.annotate.truth import Claims, claims, kind_of, vocabulary


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of k in n at 95 %; (0, 1) when nothing was looked at."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    middle, half = p + z2 / (2 * n), z * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def judge(records: Sequence[Record], truths: Mapping[str, Mapping[str, Any]]) -> dict[str, Claims | None]:
    """Record id -> what it claims; None where nothing is known about its picture."""
    labels = vocabulary(truths)
    return {r.id: claims(r, truths[r.image], labels) if r.image in truths else None for r in records}


def rates(
    records: Sequence[Record], truths: Mapping[str, Mapping[str, Any]], judged: Mapping[str, Claims | None]
) -> list[dict[str, Any]]:
    """A row per kind of truth and of text: records, how many say something decidable, statements, false ones, records with a false one."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        found, truth = judged[record.id], truths.get(record.image)
        kind = kind_of(truth) if truth else None
        if found is None or kind is None:
            continue
        row = table.setdefault(
            (kind, record.kind or "record"),
            {"records": 0, "decidable": 0, "statements": 0, "false": 0, "records_false": 0},
        )
        row["records"] += 1
        row["decidable"] += found.made > 0
        row["statements"] += found.made
        row["false"] += len(found.false)
        row["records_false"] += bool(found.false)
    out = []
    for (kind, text), row in sorted(table.items()):
        low, high = wilson(row["records_false"], row["decidable"])
        share = row["records_false"] / row["decidable"] if row["decidable"] else None
        instances = row["false"] / row["statements"] if row["statements"] else None
        out.append(
            {
                "truth": kind,
                "kind": text,
                **row,
                "false_share": instances,
                "records_false_share": share,
                "low": low,
                "high": high,
            }
        )
    return out
