"""Yes/no questions put to a backend through the corpus's own ledger: what was asked once is never paid again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mllm_fl.annotate.backends.base import Backend
from mllm_fl.annotate.engine import Limits, Question, ask
from mllm_fl.annotate.ledger import Key, Ledger, canonical
from mllm_fl.annotate.prompts import Prompt
from mllm_fl.annotate.quality.probes import VERSION, Asker
from mllm_fl.events import Progress, silent


def asker_of(backend: Backend, folder: Path, limits: Limits | None = None, progress: Progress = silent) -> Asker:
    """Who answers probes: ``backend``, with the ledger of the corpus in ``folder`` before it."""

    def answers(pairs: Sequence[tuple[Path, str]]) -> list[str | None]:
        questions = [_question(backend, picture, asked) for picture, asked in pairs]
        with Ledger(folder / "ledger.sqlite") as ledger:
            ask(questions, ledger, backend, limits, progress)
            there = ledger.answers([q.key for q in questions])
        return [there[q.key][0] if q.key in there else None for q in questions]

    return answers


def _question(backend: Backend, picture: Path, asked: str) -> Question:
    digest = hashlib.sha256(picture.read_bytes()).hexdigest()
    parameters = canonical({**backend.parameters(), "questions": (asked,)})
    key = Key(digest, "probe", VERSION, backend.model, parameters)
    return Question(key, picture, Prompt("probe", VERSION, ((asked,),)), (asked,))
