"""All checks of one corpus, in the order of the funnel: pictures first, then what was said about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_fl.annotate import truth
from mllm_fl.annotate.hallucination import judge, rates
from mllm_fl.annotate.quality import clipscore, probes, sheet, texts
from mllm_fl.annotate.quality.pictures import evaluation, inspect_pictures, plugin
from mllm_fl.annotate.quality.sheet import Sheet
from mllm_fl.annotate.records import Record, parse
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent


@dataclass(frozen=True)
class QualityConfig:
    """What is asked of a corpus. Empty and absent mean: not checked, and the funnel says so.

    ``min_side``: pixels of the shorter side; ``max_aspect``: longer to shorter side. ``evaluation``: sources whose test images must not be in the corpus. ``licences``: the allowed ones.
    ``language``: ISO 639-1. ``words``: fewest and most of a record. ``clip``: the CLIP that scores; the lowest ``clip_percentile`` % fall.
    ``inspect``: plug-ins, ``name=module:function`` (name nsfw, faces or any). ``root``: folder of the evaluation sets. ``probes``: how many yes/no questions at most.
    """

    min_side: int = 16
    max_aspect: float = 8.0
    evaluation: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    language: str = "en"
    words: tuple[int, int] = (1, 600)
    clip: str | None = None
    clip_percentile: float = 5.0
    inspect: tuple[str, ...] = ()
    root: str | None = None
    probes: int = 500

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_side", 1, None),
            ("max_aspect", 1, None),
            ("clip_percentile", 0, 100),
            ("probes", 0, None),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"{low} to {high}"
                raise UserError("corpus check", f"{name} is {value:g}", f"give {wanted}")
        if not 0 <= self.words[0] <= self.words[1]:
            problem = f"words {self.words[0]} to {self.words[1]} is no range"
            raise UserError("corpus check", problem, "give the fewest and the most, in this order")


@dataclass(frozen=True)
class Checked:
    """Both funnels and what was measured beside them."""

    images: Sheet
    records: Sheet
    hallucination: list[dict[str, Any]]
    probes: dict[str, Any] | None
    clip: dict[str, float] | None


@dataclass(frozen=True)
class Raw:
    """A corpus as it lies there, its faults kept: ``records`` are the valid ones, ``invalid`` maps the others' ids to the reason."""

    folder: Path
    ids: tuple[str, ...]
    records: tuple[Record, ...]
    invalid: dict[str, str]
    images: tuple[str, ...]


def read(folder: Path) -> Raw:
    """Every entry of ``records.json``, valid or not, and every picture that a record or the list of pictures names.

    Raises:
        UserError: no corpus here, or records.json is no JSON list.
    """
    path = folder / "records.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            folder, "no corpus here (no records.json)", "make one with `mllm-fl annotate` or `mllm-fl corpus import`"
        ) from None
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read as JSON ({e})", "restore it") from None
    if not isinstance(raw, list):
        raise UserError(
            path, f"holds a {type(raw).__name__}, not a list of records", "see LLaVA's chat.json for the form"
        )
    ids: dict[str, None] = {}
    records, invalid, images = [], {}, dict.fromkeys(r["image"] for r in _pictures(folder))
    for i, entry in enumerate(raw):
        try:
            record = parse(entry, "record")
            id, why = record.id, f"id {record.id!r} occurs twice" if record.id in ids else None
        except UserError as e:
            id, why = f"#{i + 1}", str(e).removeprefix("record: ")
        if why is None:
            records.append(record)
            images[record.image] = None
        else:
            id = f"#{i + 1}"
            invalid[id] = why
        ids[id] = None
    return Raw(folder, tuple(ids), tuple(records), invalid, tuple(images))


def _pictures(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``pictures.jsonl`` that have a picture."""
    path = folder / "pictures.jsonl"
    return [r for r in truth.rows(path) if isinstance(r.get("image"), str) and r["image"]] if path.exists() else []


def check(
    folder: Path, config: QualityConfig, progress: Progress = silent, *, asker: probes.Asker | None = None
) -> Checked:
    """Run every check, write ``quality.jsonl``, and put the numbers into ``card.json``. Nothing is removed from the corpus.

    ``asker`` answers yes/no questions about pictures (the annotator itself, say); without it the probes are not made.

    Raises:
        UserError: no corpus, an unknown evaluation set or plug-in, or the results cannot be written.
    """
    corpus = read(folder)
    facts = {r["image"]: r for r in _pictures(folder)}
    known = evaluation(config.evaluation, config.root, progress) if config.evaluation else None
    plugins = dict(plugin(p) for p in config.inspect)
    images = inspect_pictures(
        folder, corpus.images, facts, min_side=config.min_side, max_aspect=config.max_aspect, licences=config.licences, known=known, plugins=plugins, progress=progress,
    )  # fmt: skip
    records = Sheet("records", corpus.ids)
    records.begin("schema")
    records.failed["schema"] = dict(corpus.invalid)
    records.begin("picture")
    for r in corpus.records:
        if why := images.reasons(r.image):
            records.failed["picture"][r.id] = "; ".join(f"{c}: {w}" for c, w in why.items())
    _said(records, corpus.records, config)
    clip = _scored(records, corpus, images, config, progress)
    truths = truth.load(folder, corpus.images)
    judged = judge(corpus.records, truths)
    records.begin(
        "objects", None if truths else "nothing is known about the pictures (no truth.jsonl, no scenes.jsonl)"
    )
    if truths:
        for r in corpus.records:
            found = judged[r.id]
            if found is None or not found.made:
                records.unchecked["objects"][r.id] = (
                    "nothing is known about its picture" if found is None else "says nothing that its truth decides"
                )
            elif found.false:
                records.failed["objects"][r.id] = f"states what is not so: {', '.join(found.false[:5])}"
    answered = _probed(records, corpus, truths, config, asker, progress)
    for check_name in records.checks[2:]:
        if check_name not in records.blind:
            records.unchecked[check_name].update(dict.fromkeys(corpus.invalid, "the record is not valid"))
    out = Checked(images, records, rates(corpus.records, truths, judged), answered, clip)
    sheet.write(folder, asdict(config), images, records)
    if truths and not (folder / truth.FILE).exists() and not (folder / "scenes.jsonl").exists():
        truth.save(folder, truths)
    update_card(folder, {"quality": summary(out), "hallucination": out.hallucination})
    progress(Event("check", len(corpus.ids), len(corpus.ids), "done"))
    return out


def _said(found: Sheet, records: Sequence[Record], config: QualityConfig) -> None:
    """The checks that need the text alone."""
    simple: Mapping[str, Callable[[Record], str | None]] = {
        "refusal": texts.refusal, "truncation": texts.truncation, "leakage": texts.leakage, "repetition": texts.repetition,
        "length": lambda r: texts.length(r, *config.words),
    }  # fmt: skip
    for name, test in simple.items():
        found.begin(name)
        found.failed[name] = {r.id: why for r in records if (why := test(r)) is not None}
    found.begin("sameness")
    found.failed["sameness"] = texts.sameness(records)
    try:
        texts.detector()
    except UserError as e:
        found.begin("language", str(e))
        return
    found.begin("language")
    for r in records:
        try:
            why = texts.language(r, config.language)
        except ValueError as e:
            found.unchecked["language"][r.id] = str(e)
            continue
        if why is not None:
            found.failed["language"][r.id] = why


def _scored(
    found: Sheet, corpus: Raw, images: Sheet, config: QualityConfig, progress: Progress
) -> dict[str, float] | None:
    found.begin("clip", None if config.clip else "no CLIP was named (--clip)")
    if not config.clip:
        return None
    values = clipscore.scores(corpus.folder, corpus.records, config.clip, progress)
    edge, low = clipscore.lowest(values, config.clip_percentile)
    found.failed["clip"] = {
        id: f"score {values[id]:.3f} is below {edge:.3f}, percentile {config.clip_percentile:g}" for id in low
    }
    found.unchecked["clip"] = {r.id: "its picture cannot be decoded" for r in corpus.records if r.id not in values}
    ordered = sorted(values.values())
    middle = ordered[len(ordered) // 2] if ordered else 0.0
    return {"records": len(values), "edge": edge, "median": middle, "percentile": config.clip_percentile}


def _probed(
    found: Sheet, corpus: Raw, truths: Mapping[str, Mapping[str, Any]], config: QualityConfig, asker: probes.Asker | None, progress: Progress
) -> dict[str, Any] | None:  # fmt: skip
    """Two uses of yes/no questions: with a truth, the annotator's accuracy; and for each record whether the annotator stands by what it named."""
    found.begin("probes", None if asker is not None else "nobody was there to ask (--probe)")
    if asker is None:
        return None
    accuracy = probes.measure(corpus.folder, truths, config.probes, asker, progress)
    denied, asked = probes.stand_by(corpus.folder, corpus.records, config.probes, asker, progress)
    found.failed["probes"] = denied
    found.unchecked["probes"] = {
        r.id: "not among the records that were drawn, or names nothing" for r in corpus.records if r.id not in asked
    }
    return accuracy | {"stood_by": {"asked": len(asked), "denied": len(denied)}}


def summary(found: Checked) -> dict[str, Any]:
    """What goes into the card: the funnels, and what was measured."""
    out: dict[str, Any] = {
        s.of: {"items": len(s.items), "kept": len(s.kept()), "funnel": [asdict(x) for x in s.funnel()]}
        for s in (found.images, found.records)
    }
    return out | {"clip": found.clip, "probes": found.probes}


def update_card(folder: Path, more: Mapping[str, Any]) -> None:
    """Add keys to ``card.json``; what others wrote there stays.

    Raises:
        UserError: the card cannot be read or written.
    """
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read ({e})", "delete it: it only describes the corpus") from None
    card = card if isinstance(card, dict) else {}
    write_whole(path, (json.dumps(card | dict(more), indent=1, ensure_ascii=False) + "\n").encode())
