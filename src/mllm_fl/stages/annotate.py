"""Stage 1a, annotation: a multimodal LLM describes open images (MLLM-LLaVA-FL, arXiv:2409.06067, §3.1).

The paper names the three kinds of text (conversation, detailed description, complex reasoning) and GPT-4 as author, and then trains on
CC-595K's captions; nothing more is said. Here any model answers, what it said is kept in a ledger, and only checked answers become records.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mllm_fl.annotate.agreement import agreement
from mllm_fl.annotate.backends.base import Backend
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.engine import Limits, Outcome, Pending, Question, ask, chunks
from mllm_fl.annotate.ledger import Key, Ledger, born, canonical, printable
from mllm_fl.annotate.open_images import OpenImages, lay_out
from mllm_fl.annotate.prices import price_of
from mllm_fl.annotate.prompts import Prompt, prompts_for
from mllm_fl.annotate.records import Record, save
from mllm_fl.data import glyph_cache
from mllm_fl.data.check import Prints, prints, prints_of
from mllm_fl.data.decode import THREADS, fit, to_array, to_rgb
from mllm_fl.data.files import write_whole
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.runs import differences, read_json
from mllm_fl.stages.annotate_config import AnnotateConfig

__all__ = ["AnnotateConfig", "annotate", "corpus_prints", "make_backend", "open_prints"]


def annotate(
    config: AnnotateConfig,
    folder: Path,
    progress: Progress = silent,
    *,
    backend: Backend | None = None,
    retry: bool = False,
    wait: bool = True,
) -> Corpus:
    """Make the corpus in ``folder``, or finish it, or open it when it is finished.

    Killed at any moment, the same call goes on: what was answered is in the ledger and is not asked again. Two processes on one folder
    share the work. ``retry`` asks the failed ones of a finished corpus again. ``backend`` takes the place of the configured one.
    ``wait`` False: of batches, only hand in and fetch what there is.

    Raises:
        UserError: no images, endpoint down, nothing usable answered, a cap reached, batches still at work, or the folder was begun with
            another configuration.
    """
    begun = folder / "annotate.json"
    made = config.lasting() | {"made": _made(config, backend, folder)}
    if begun.exists():
        _same(folder, read_json(begun), made)
        if (folder / "records.json").exists() and not retry:
            return Corpus.open(folder)
    elif (folder / "records.json").exists():
        raise UserError(folder, "holds a corpus that was not annotated here (no annotate.json)", "use another folder")
    prompts = prompts_for(config.kinds, config.style, config.labels or ())
    progress(Event("annotate", 0, config.images * len(prompts), "preparing the open images"))
    _sweep(folder)
    limits = limits_of(config)
    pictures = lay_out(config.open_images(), folder, progress)
    backend = backend or make_backend(config)
    made["made"] |= {"model": backend.model}  # a hub id may have been fetched only now
    if config.source != "glyphs":
        made["made"]["pictures"] = config.open_images().digest(folder)
    write_whole(begun, (json.dumps(made, indent=1) + "\n").encode())
    questions = questions_of(pictures, prompts, backend, folder)
    with Ledger(folder / "ledger.sqlite") as ledger:
        if config.batch:
            from mllm_fl.annotate.backends.batch import ask_batches
            from mllm_fl.annotate.backends.openai import OpenAIBackend

            assert isinstance(backend, OpenAIBackend)
            outcome = ask_batches(
                list(questions.values()), ledger, backend, limits, folder / "batches", progress, wait=wait
            )
        else:
            outcome = ask(list(questions.values()), ledger, backend, limits, progress)
        _finish(config, folder, pictures, prompts, questions, ledger, backend, outcome)
    return Corpus.open(folder)


def make_backend(config: AnnotateConfig) -> Backend:
    """The backend that ``annotate.backend`` names, in Ray's actors if ``annotate.actors`` says so."""
    if config.actors is not None:
        return _on_ray(config, config.actors)
    if config.backend == "openai":
        from mllm_fl.annotate.backends.openai import OpenAIBackend

        assert config.model is not None
        return OpenAIBackend(
            config.model, config.base_url, config.api_key_env, config.max_tokens, concurrency=config.concurrency,
            retries=config.retries, timeout=config.timeout, first_pause=config.first_pause, max_side=config.max_side or 768,
            requests_per_minute=config.requests_per_minute, tokens_per_minute=config.tokens_per_minute,
        )  # fmt: skip
    from mllm_fl.annotate.backends.local import LocalBackend

    return LocalBackend(
        config.backend, max_tokens=config.max_tokens, batch_size=config.batch_size, device=config.device
    )


def _on_ray(config: AnnotateConfig, actors: int) -> Backend:
    from mllm_fl.annotate.backends.local import identity, parameters_of
    from mllm_fl.annotate.backends.ray_data import RayBackend

    rates = {"requests_per_minute": config.requests_per_minute, "tokens_per_minute": config.tokens_per_minute}
    shares: dict[str, Any] = {k: v / actors for k, v in rates.items() if v is not None}
    own = dataclasses.replace(config, actors=None, **shares)
    if config.backend == "openai":
        one = make_backend(own)
        model, parameters, inner = one.model, one.parameters(), 4 * config.concurrency
    else:
        known = identity(config.backend)
        if known is None:
            way_out = "fetch it on every machine first (hf download NAME), or name a folder"
            raise UserError(f"annotate.backend {config.backend!r}", "is not on this machine", way_out)
        model, parameters, inner = known, parameters_of(config.max_tokens), config.batch_size
    return RayBackend(partial(make_backend, own), model, parameters, inner, actors, config.actor_gpus)


def limits_of(config: AnnotateConfig) -> Limits:
    """The caps, with the price of the model where one is given; a model on this machine costs nothing."""
    price = price_of(config.prices, config.model or config.backend) if config.backend == "openai" else None
    again = (1 if config.backend == "openai" else 0) if config.again is None else config.again
    return Limits(config.max_cost, config.max_requests, price, again)


def questions_of(
    pictures: OpenImages, prompts: Sequence[Prompt], backend: Backend, folder: Path
) -> dict[Key, Question]:
    """What is asked, by key; equal pictures are asked about once. Questions of one kind about near pictures stand together."""
    out: dict[Key, Question] = {}
    same: dict[str, str] = {}  # one string per wording, however many pictures share it
    common = backend.parameters()
    for part in chunks(range(len(pictures.paths)), backend.batch_size):
        for prompt in prompts:
            for i in part:
                asked = prompt.questions(pictures.hashes[i])
                words = canonical({**common, "questions": asked})
                key = Key(pictures.hashes[i], prompt.kind, prompt.version, backend.model, same.setdefault(words, words))
                about = (pictures.sources[i], pictures.licences[i])
                out.setdefault(key, Question(key, folder / pictures.paths[i], prompt, asked, *about))
    return out


def _made(config: AnnotateConfig, backend: Backend | None, folder: Path) -> dict[str, Any]:
    """What a corpus depends on beyond its configuration: who answers, the prompts' versions, the pictures. None: not known here."""
    model = backend.model if backend is not None else None
    if backend is None and config.backend != "openai":
        from mllm_fl.annotate.backends.local import identity

        model = identity(config.backend)
    pictures: str | None = f"glyphs {glyph_cache.VERSION}"
    if config.source != "glyphs":  # of a new corpus it is known when the pictures are laid out
        pictures = config.open_images().digest(folder) if (folder / "annotate.json").exists() else None
    prompts = prompts_for(config.kinds, config.style, config.labels or ())
    return {"model": model, "prompts": {p.kind: p.version for p in prompts}, "pictures": pictures}


def _same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with, or to hand out, a corpus that this call would not make; what is not known now is not compared."""
    unknown = {k for k, v in now["made"].items() if v is None}
    then_made = {k: v for k, v in then.get("made", {}).items() if k not in unknown}
    now_made = {k: v for k, v in now["made"].items() if k not in unknown}
    diff = differences(then | {"made": then_made}, now | {"made": now_made})
    if diff:
        raise UserError(
            folder,
            f"the corpus was begun with another configuration: {'; '.join(diff)}",
            "use another folder, or delete this one",
        )


def _finish(
    config: AnnotateConfig, folder: Path, pictures: OpenImages, prompts: Sequence[Prompt], questions: dict[Key, Question],
    ledger: Ledger, backend: Backend, outcome: Outcome,
) -> None:  # fmt: skip
    """Write card.json, then records.json: its presence means that the corpus is finished."""
    records = _records(pictures, prompts, questions, ledger)
    if outcome.waiting:
        problem = f"{outcome.waiting} batches are at work at the endpoint"
        raise Pending(folder, problem, "run the same command later: it fetches what is done")
    if outcome.stopped is not None:
        there = sum(1 for _ in ledger.answered(questions))
        problem = f"stopped at {outcome.stopped}: {there:,} of {len(questions):,} annotations are there"
        raise UserError(folder, problem, "raise the cap and run the same command; nothing is asked or paid twice")
    if not records:
        reason = next(iter(outcome.failed.values()), "no questions")
        raise UserError(
            folder,
            f"not one of {len(questions)} annotations succeeded; the first failed with: {reason}",
            "check [annotate]",
        )
    total = dataclasses.asdict(ledger.totals()) | ({} if config.prices else {"cost": None})
    card = {
        **({"price": config.prices} if config.prices else {}),
        "source": config.source, "seed": config.seed, "model": backend.model, "parameters": backend.parameters(),
        "images": len(pictures.paths), "coverage": pictures.coverage, "unreadable": pictures.unreadable, "records": len(records),
        "kinds": {p.kind: _card_of(p, records, questions, ledger, outcome) for p in prompts},
        "failures": dict(Counter(outcome.failed.values())), "bill": total if config.backend == "openai" else None,
        "licences": dict(Counter(x or "not known" for x in pictures.licences)),
        "agreement": agreement(records, pictures.scenes) if pictures.scenes else "not checked: no scene records",
    }  # fmt: skip
    older = read_json(folder / "card.json") if (folder / "card.json").exists() else {}
    card = {k: v for k, v in (older | card).items() if v is not None}
    write_whole(folder / "card.json", printable(json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    save(records, folder / "records.json")


def _card_of(
    prompt: Prompt, records: Sequence[Record], questions: dict[Key, Question], ledger: Ledger, outcome: Outcome
) -> dict[str, Any]:
    mine = [r for r in records if r.kind == prompt.kind]
    failed = sum(k.kind == prompt.kind for k in outcome.failed)
    labels = {"labels": dict(Counter(r.answers[0] for r in mine))} if prompt.form == "label" else {}
    used = ledger.usage([k for k in questions if k.kind == prompt.kind])
    return {"prompt": prompt.version, "ok": len(mine), "failed": failed, **labels, **used}


def _records(
    pictures: OpenImages, prompts: Sequence[Prompt], questions: dict[Key, Question], ledger: Ledger
) -> list[Record]:
    """The records that the ledger's answers make, picture by picture."""
    by_place = {(k.image, k.kind): k for k in questions}
    out = []
    for i, (path, sha) in enumerate(zip(pictures.paths, pictures.hashes, strict=True)):
        keys = [by_place[sha, prompt.kind] for prompt in prompts]
        there = ledger.answers(keys)
        for prompt, key in zip(prompts, keys, strict=True):
            if key in there:
                out.append(prompt.record(f"{i:06d}-{prompt.kind}", path, questions[key].asked, there[key]))
    return out


def _sweep(folder: Path) -> None:
    """Remove the half-written files of processes that died on this machine."""
    for leftover in folder.rglob(".*.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not born(int(pid)):
            leftover.unlink(missing_ok=True)


def open_prints(config: AnnotateConfig, size: int) -> list[Prints] | None:
    """The open images' hashes for a leak check, before anybody is asked about them; None when their folder is not there.

    As stored: the files' own pixels, whatever ``image_size`` makes of them, or a rendered character's counts. As used: at ``size``.
    """
    if config.source == "glyphs":
        return list(prints(render_glyphs(config.images, config.seed, image_size=size)[0]))
    source = config.open_images()
    return _prints_of_files(source.files(), size) if source.root is not None and source.root.is_dir() else None


def corpus_prints(folder: Path, images: Iterable[str], size: int) -> list[Prints]:
    """The same of a corpus that is there, whose source may be gone: ``images`` below ``folder``."""
    return _prints_of_files([folder / image for image in images], size)


def _prints_of_files(files: Sequence[Path], size: int) -> list[Prints]:
    def one(path: Path) -> Prints | None:
        try:
            picture = to_rgb(path)
        except ValueError:
            return None  # annotation lists it as unreadable
        return prints_of(to_array(picture), to_array(fit(picture, size)))

    with ThreadPoolExecutor(THREADS) as pool:
        return [p for p in pool.map(one, files) if p is not None]
