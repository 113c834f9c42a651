"""What the checks found: per item and check one of three words, and the funnel that counts them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError

Status = Literal["ok", "failed", "not checked"]
FILE = "quality.jsonl"


@dataclass(frozen=True)
class Step:
    """One line of the funnel: of ``reached`` items, ``fell`` at this check first; ``failed`` counts all that fail it, also earlier fallen ones."""

    check: str
    reached: int
    fell: int
    failed: int
    not_checked: int
    why_not: str = ""


@dataclass
class Sheet:
    """The findings about pictures, or about records. An item that is in neither ``failed`` nor ``unchecked`` of a check is ok there.

    ``checks``: names in the order of the funnel. ``blind``: checks that nobody made at all, with the reason.
    """

    of: str
    items: Sequence[str]
    checks: list[str] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    unchecked: dict[str, dict[str, str]] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)

    def begin(self, check: str, why_not: str | None = None) -> None:
        """Announce a check; ``why_not``: it is not made, for this reason."""
        self.checks.append(check)
        self.failed[check], self.unchecked[check] = {}, {}
        if why_not is not None:
            self.blind[check] = why_not

    def status(self, check: str, item: str) -> Status:
        """One of the three words."""
        if check in self.blind or item in self.unchecked[check]:
            return "not checked"
        return "failed" if item in self.failed[check] else "ok"

    def reasons(self, item: str) -> dict[str, str]:
        """The checks that the item fails, with the reasons."""
        return {c: self.failed[c][item] for c in self.checks if item in self.failed[c]}

    def kept(self) -> list[str]:
        """The items that fail nothing, in order."""
        bad = {item for found in self.failed.values() for item in found}
        return [item for item in self.items if item not in bad]

    def funnel(self) -> list[Step]:
        """How many fell where; the numbers that fell and those kept add up to all items."""
        fallen: set[str] = set()
        steps = []
        for check in self.checks:
            bad = self.failed[check].keys()
            reached = len(self.items) - len(fallen)
            first = bad - fallen
            missing = len(self.items) if check in self.blind else len(self.unchecked[check])
            why = self.blind.get(check) or _commonest(self.unchecked[check].values())
            steps.append(Step(check, reached, len(first), len(bad), missing, why))
            fallen |= first
        return steps

    def lines(self) -> Iterable[dict[str, Any]]:
        """As JSON objects: one a check, then one for each item about which there is something to say."""
        for step in self.funnel():
            yield {"of": self.of, "check": step.check, "items": len(self.items), "fell": step.fell, "failed": step.failed, "not_checked": step.not_checked,
                   "why_not": step.why_not, "blind": step.check in self.blind}  # fmt: skip
        for item in self.items:
            failed = self.reasons(item)
            unchecked = {c: found[item] for c, found in self.unchecked.items() if item in found}
            if failed or unchecked:
                yield {"of": self.of, "item": item, "failed": failed, "not_checked": unchecked}


def _commonest(reasons: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return max(counts, key=lambda r: counts[r], default="")


def write(folder: Path, settings: dict[str, Any], images: Sheet, records: Sheet) -> None:
    """``quality.jsonl``, whole or not at all: the settings, then both sheets."""
    rows: list[dict[str, Any]] = [{"settings": settings}, *images.lines(), *records.lines()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / FILE, text.encode())


def read(folder: Path, images: Sequence[str], records: Sequence[str]) -> tuple[Sheet, Sheet] | None:
    """Both sheets as they were written about these items; None when the corpus was never checked.

    Raises:
        UserError: the file is damaged, or the corpus has other items now.
    """
    path = folder / FILE
    if not path.exists():
        return None
    sheets = {"images": Sheet("images", images), "records": Sheet("records", records)}
    totals: dict[str, int] = {}
    try:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            row = json.loads(line)
            if "check" in row:
                sheets[row["of"]].begin(row["check"], row["why_not"] if row["blind"] else None)
                totals[row["of"]] = row["items"]
            elif "item" in row:
                for check, why in row["failed"].items():
                    sheets[row["of"]].failed[check][row["item"]] = why
                for check, why in row["not_checked"].items():
                    sheets[row["of"]].unchecked[check][row["item"]] = why
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(path, f"cannot be read ({e})", "run `mllm-fl corpus check` again") from None
    known = {of: set(s.items) for of, s in sheets.items()}
    stranger = any(
        set(found) - known[of] for of, s in sheets.items() for found in (*s.failed.values(), *s.unchecked.values())
    )
    if stranger or totals != {of: len(s.items) for of, s in sheets.items()}:
        raise UserError(path, "is about another state of this corpus", "run `mllm-fl corpus check` again")
    return sheets["images"], sheets["records"]
