"""A person looks at a sample of a corpus: keep, relabel or drop. What they decide is kept beside the corpus, and gives an estimate of its error rate.

``review.jsonl``: first the sample (seed, size, of how many), then a line per decision. It is written whole after every decision.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mllm_fl.annotate.hallucination import wilson
from mllm_fl.annotate.records import IMAGE, Record, Turn
from mllm_fl.annotate.truth import rows
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError
from mllm_fl.seeds import numpy_stream

FILE = "review.jsonl"
DECISIONS = ("keep", "relabel", "drop")


@dataclass(frozen=True)
class Decision:
    """What was decided about a record. ``answers``: its new answers, of a relabelled one. ``at``: seconds since 1970. ``by``: who, if said."""

    id: str
    decision: str
    answers: tuple[str, ...] = ()
    at: float = 0.0
    by: str = ""


@dataclass(frozen=True)
class Estimate:
    """The share of records that are not good as they are: relabelled or dropped, of those decided in the sample, with its interval at 95 %."""

    errors: int
    decided: int
    sample: int
    of: int
    low: float
    high: float

    @property
    def rate(self) -> float | None:
        """None before the first decision."""
        return self.errors / self.decided if self.decided else None

    def text(self) -> str:
        """One line."""
        if self.rate is None:
            return f"nothing decided yet of a sample of {self.sample} from {self.of:,} records"
        return (
            f"error rate {100 * self.rate:.1f} % ({self.errors} of {self.decided} records), 95 % interval {100 * self.low:.1f} to {100 * self.high:.1f} % (Wilson); "
            f"{self.decided} of a sample of {self.sample} from {self.of:,} records"
        )


def sample(records: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """``count`` records drawn without replacement, the same for the same corpus and seed, in the order drawn."""
    if count < 1:
        raise UserError("--sample", f"{count} is below 1")
    order = numpy_stream(seed, "review").permutation(len(records))
    return [records[int(i)] for i in order[:count]]


class Review:
    """A review in progress: the drawn sample, and the decisions so far, which lie on the disk after each call of :meth:`decide`."""

    def __init__(self, folder: Path, records: Sequence[Record], count: int = 100, seed: int = 0) -> None:
        self.folder, self.of = folder, len(records)
        self.sample = sample(records, count, seed)
        self.by_id = {r.id: r for r in records}
        self._seed = seed
        self.decisions = {id: d for id, d in read(folder).items() if id in self.by_id}

    def decide(self, id: str, decision: str, answers: Sequence[str] = (), by: str = "") -> None:
        """Keep, relabel (with all new answers) or drop a record; an empty decision takes the last one back.

        Raises:
            UserError: an unknown record or decision, new answers that make no valid record, or nothing can be written.
        """
        if id not in self.by_id:
            raise UserError(f"record {id!r}", "is not in this corpus", "reload the page")
        if decision not in (*DECISIONS, ""):
            raise UserError(f"record {id!r}", f"{decision!r} is no decision", f"use one of {', '.join(DECISIONS)}")
        after = dict(self.decisions)
        if decision:
            found = Decision(id, decision, tuple(answers) if decision == "relabel" else (), round(time.time(), 3), by)
            _valid(self.by_id[id], found)
            after[id] = found
        else:
            after.pop(id, None)
        write(self.folder, after, {"seed": self._seed, "sample": [r.id for r in self.sample], "of": self.of})
        self.decisions = after

    def estimate(self) -> Estimate:
        """The error rate so far; only records of the random sample count."""
        return _estimate(self.decisions, [r.id for r in self.sample], self.of)


def _estimate(decisions: Mapping[str, Decision], drawn: Sequence[str], of: int) -> Estimate:
    decided = [decisions[id] for id in drawn if id in decisions]
    errors = sum(d.decision != "keep" for d in decided)
    return Estimate(errors, len(decided), len(drawn), of, *wilson(errors, len(decided)))


def _valid(record: Record, decision: Decision) -> None:
    if decision.decision != "relabel":
        return
    answers = decision.answers
    wrong = (
        f"has {len(record.answers)} answers, not {len(answers)}" if len(answers) != len(record.answers)
        else "has an empty answer" if not all(a.strip() for a in answers)
        else f"contains {IMAGE}" if any(IMAGE in a for a in answers) else ""
    )  # fmt: skip
    if wrong:
        raise UserError(f"record {record.id!r}", f"relabelled, it {wrong}", "write every answer")


def applied(record: Record, decision: Decision | None) -> Record:
    """The record with its new answers, if it was relabelled."""
    if decision is None or decision.decision != "relabel":
        return record
    new = iter(decision.answers)
    return replace(
        record, turns=tuple(Turn(t.speaker, next(new).strip()) if t.speaker == "gpt" else t for t in record.turns)
    )


def write(folder: Path, decisions: Mapping[str, Decision], drawn: Mapping[str, Any]) -> None:
    """``review.jsonl``, whole or not at all."""
    lines = [
        json.dumps({"drawn": dict(drawn)}),
        *(json.dumps(asdict(d), ensure_ascii=False) for d in decisions.values()),
    ]
    write_whole(folder / FILE, ("\n".join(lines) + "\n").encode())


def read(folder: Path) -> dict[str, Decision]:
    """The decisions so far, by record id.

    Raises:
        UserError: the file is damaged.
    """
    return {d.id: d for d in (_decision(folder, r) for r in _lines(folder) if "drawn" not in r)}


def estimate(folder: Path) -> Estimate | None:
    """The error rate of the last sample; None when nobody has looked yet."""
    drawn = next((r["drawn"] for r in _lines(folder) if isinstance(r.get("drawn"), dict)), None)
    return None if drawn is None else _estimate(read(folder), [str(i) for i in drawn["sample"]], int(drawn["of"]))


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    return rows(path) if path.exists() else []


def _decision(folder: Path, row: dict[str, Any]) -> Decision:
    try:
        found = Decision(**{**row, "answers": tuple(row.get("answers", ()))})
        if found.decision not in DECISIONS:
            raise ValueError(found.decision)
        return found
    except (TypeError, ValueError) as e:
        raise UserError(
            folder / FILE, f"holds a line that is no decision ({e})", "restore it, or delete it to begin again"
        ) from None
