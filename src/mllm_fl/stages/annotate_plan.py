"""What an annotation would ask, cost and take, before anything is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mllm_fl.annotate.backends.openai import OpenAIBackend
from mllm_fl.annotate.engine import duration
from mllm_fl.annotate.ledger import Ledger
from mllm_fl.annotate.open_images import FILE
from mllm_fl.annotate.prices import TYPICAL, image_tokens, request_tokens
from mllm_fl.annotate.prompts import Prompt, prompts_for
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import limits_of
from mllm_fl.stages.annotate_config import AnnotateConfig

LOOKED_AT = 64  # pictures whose size is read
_SECONDS, _EACH = 1.0, 0.02  # of an answer, and of each of its tokens: a guess, until the ledger knows


@dataclass(frozen=True)
class Estimate:
    """``cost`` is likely, ``most`` if every answer is as long as it may be; None without prices. ``seconds``: time left."""

    folder: str
    pictures: int
    questions: int
    answered: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most: float | None
    spent: float
    seconds: float
    basis: str

    def text(self) -> str:
        """Lines for a person."""
        lines = [
            f"corpus    {self.folder}",
            f"pictures  {self.pictures:,}",
            f"questions {self.questions:,}, {self.answered:,} of them answered already",
            f"calls     {self.calls:,}",
            f"tokens    about {self.prompt_tokens:,} in, {self.completion_tokens:,} out",
            "cost      not known: give annotate.prices or --prices FILE"
            if self.cost is None
            else f"cost      about {self.cost:.4g}, at most {self.most:.4g}; {self.spent:.4g} spent so far",
            f"time      about {duration(self.seconds)}",
            f"basis     {self.basis}",
        ]
        return "\n".join(lines)


def estimate(config: AnnotateConfig, folder: Path) -> Estimate:
    """The likely bill of what is not answered yet; reads the ledger and a few pictures, and writes nothing.

    Tokens and seconds are the ledger's means where this model has answered questions of the kind, and guesses otherwise.

    Raises:
        UserError: the source is not there, or the price table does not name the model.
    """
    if config.backend != "openai":
        raise UserError("--dry-run", f"estimates the bill of an endpoint; {config.backend!r} costs nothing", "run it")
    assert config.model is not None
    pictures, seen = _pictures(config, folder)
    price = limits_of(config).price
    totals = {"questions": 0, "answered": 0, "calls": 0, "in": 0.0, "out": 0.0, "most": 0.0, "work": 0.0}
    known_kinds = []
    ledger = Ledger(folder / "ledger.sqlite") if (folder / "ledger.sqlite").exists() else None
    for prompt in prompts_for(config.kinds, config.style, config.labels or ()):
        there, read, written, seconds = (
            (0, 0.0, 0.0, 0.0) if ledger is None else ledger.means(config.model, prompt.kind)
        )
        asked = _longest(prompt)
        left = max(0, pictures - there)
        if there:
            known_kinds.append(f"{prompt.kind} ({there:,})")
        else:
            read = request_tokens(prompt.system, asked, seen)
            written = min(TYPICAL.get(prompt.kind, 100), config.max_tokens) * len(asked)
            seconds = len(asked) * _SECONDS + _EACH * written
        totals["questions"] += pictures
        totals["answered"] += min(there, pictures)
        totals["calls"] += left * len(asked)
        totals["in"] += left * read
        totals["out"] += left * written
        totals["most"] += left * config.max_tokens * len(asked)
        totals["work"] += left * seconds
    spent = 0.0 if ledger is None else ledger.totals().cost
    if ledger is not None:
        ledger.close()
    cost = None if price is None else price.cost(totals["in"], totals["out"], batch=bool(config.batch))
    most = None if price is None else price.cost(totals["in"], totals["most"], batch=bool(config.batch))
    guess = f"the ledger's means for {', '.join(known_kinds)}" if known_kinds else "guesses: nothing is answered yet"
    return Estimate(
        str(folder), pictures, int(totals["questions"]), int(totals["answered"]), int(totals["calls"]), round(totals["in"]),
        round(totals["out"]), cost, most, spent, _time(config, totals), guess,
    )  # fmt: skip


def _time(config: AnnotateConfig, totals: dict[str, float]) -> float:
    """Seconds: by the endpoint's speed with so many in flight, or by the limits per minute, whichever is longer."""
    seconds = [totals["work"] / config.concurrency]
    if config.requests_per_minute is not None:
        seconds.append(60 * totals["calls"] / config.requests_per_minute)
    if config.tokens_per_minute is not None:
        seconds.append(60 * (totals["in"] + totals["out"]) / config.tokens_per_minute)
    return max(seconds)


def _pictures(config: AnnotateConfig, folder: Path) -> tuple[int, int]:
    """(how many pictures, tokens of one on the average)."""
    source, side = config.open_images(), config.max_side or OpenAIBackend.max_side
    if source.root is None:
        size = source.size or 16
        return source.count, image_tokens(size, size, side)
    laid_out = folder / FILE
    if laid_out.exists():
        rows = [json.loads(line) for line in laid_out.read_text(encoding="utf-8").split("\n") if line]
        files = [folder / row["image"] for row in rows if row["state"] == "ok"]
    elif source.root.is_dir():
        files = source.files()
    else:
        raise UserError("annotate.source", f"{source.root} is not a folder", "give folder:PATH of the open images")
    sizes = []
    for path in files[:: max(1, len(files) // LOOKED_AT)][:LOOKED_AT]:
        try:
            with Image.open(path) as found:
                sizes.append(image_tokens(*((source.size,) * 2 if source.size else found.size), side))
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue  # the annotation lists it as unreadable
    return len(files), round(sum(sizes) / max(len(sizes), 1))


def _longest(prompt: Prompt) -> tuple[str, ...]:
    return max(prompt.variants, key=lambda asked: sum(len(q) for q in asked))
