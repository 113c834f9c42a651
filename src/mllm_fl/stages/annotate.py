"""Stage 1a, annotation: a multimodal LLM describes open images (MLLM-LLaVA-FL, arXiv:2409.06067, §3.1).

The paper names the three kinds of text (conversation, detailed description, complex reasoning) and GPT-4 as author, and then trains on
CC-595K's captions; nothing more is said. Here any model answers, what it said is kept in a ledger, and only checked answers become records.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mllm_fl.annotate.agreement import agreement
from mllm_fl.annotate.backends.base import Backend, Request, png
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.ledger import Entry, Key, Ledger, born, canonical
from mllm_fl.annotate.prompts import KINDS, Prompt, prompts_for
from mllm_fl.annotate.records import Record, save
from mllm_fl.data import glyph_cache
from mllm_fl.data.check import Prints, prints, prints_of
from mllm_fl.data.decode import EXTENSIONS, THREADS, fit, to_array, to_rgb
from mllm_fl.data.files import write_whole
from mllm_fl.data.folder import image_files
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.runs import differences, read_json
from mllm_fl.seeds import numpy_stream
from mllm_fl.toml import to_dict

T = TypeVar("T")
_FREE = (
    "base_url",
    "api_key_env",
    "concurrency",
    "retries",
    "timeout",
    "first_pause",
)  # may change when a corpus is continued


@dataclass(frozen=True)
class AnnotateConfig:
    """``[annotate]``: which open images, and who says what about them.

    ``source``: "glyphs" (rendered characters with known truth) or ``folder:PATH`` (any images below it). ``images``: how many,
    drawn without replacement. ``image_size``: pixels of the shorter side; absent means 16 for glyphs, as they are for folders.
    ``backend``: "mini" (the bundled model), "openai" (an endpoint, with ``model`` and ``base_url``), or a Hugging Face folder or id.
    ``prompts``: "auto" takes the bundled model's own questions for "mini", and our instructions for all others.
    ``timeout`` and ``first_pause`` are in seconds.
    """

    source: str = "glyphs"
    images: int = 384
    image_size: int | None = None
    seed: int = 1000
    kinds: tuple[str, ...] = ("conversation", "detail", "reasoning")
    backend: str = "mini"
    prompts: Literal["auto", "instruct", "glyphs"] = "auto"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 256
    batch_size: int = 64
    concurrency: int = 16
    retries: int = 5
    timeout: float = 120.0
    first_pause: float = 1.0

    def __post_init__(self) -> None:
        for name in ("images", "max_tokens", "batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"annotate.{name}", f"{getattr(self, name)} is below 1")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise UserError("annotate.image_size", f"{self.image_size} is outside 8 .. 4096 pixels")
        if self.source != "glyphs" and not self.source.removeprefix("folder:") != self.source:
            raise UserError("annotate.source", f"unknown source {self.source!r}", "use glyphs or folder:PATH")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError("annotate.kinds", f"unknown kind {kind!r}", f"choose from {', '.join(KINDS)}")
        if self.backend == "openai" and not self.model:
            raise UserError("annotate.model", "is not set, and an endpoint needs a model's name", 'write model = "..."')
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                "annotate.base_url", f"{self.base_url!r} is no http(s) address", "for example http://127.0.0.1:8000/v1"
            )
        if self.retries < 0 or self.timeout <= 0 or self.first_pause < 0:
            raise UserError(
                "annotate.retries",
                "retries, timeout and first_pause must not be negative",
                "timeout is above 0 seconds",
            )


@dataclass(frozen=True)
class _Open:
    """The open images as they lie in the corpus folder: relative path and SHA-256 of the pixels, in order."""

    paths: list[str]
    hashes: list[str]
    scenes: dict[str, dict[str, Any]]
    unreadable: dict[str, str]


def annotate(
    config: AnnotateConfig,
    folder: Path,
    progress: Progress = silent,
    *,
    backend: Backend | None = None,
    retry: bool = False,
) -> Corpus:
    """Make the corpus in ``folder``, or finish it, or open it when it is finished.

    Killed at any moment, the same call goes on: what was answered is in the ledger and is not asked again. Two processes on one folder
    share the work. ``retry`` asks the failed ones of a finished corpus again. ``backend`` takes the place of the configured one.

    Raises:
        UserError: no images, endpoint down, nothing usable answered, or the folder was begun with another configuration.
    """
    begun = folder / "annotate.json"
    resolved = {k: v for k, v in to_dict(config).items() if k not in _FREE}
    made = resolved | {"made": _made(config, backend)}
    if begun.exists():
        _same(folder, read_json(begun), made)
        if (folder / "records.json").exists() and not retry:
            return Corpus.open(folder)
    elif (folder / "records.json").exists():
        raise UserError(folder, "holds a corpus that was not annotated here (no annotate.json)", "use another folder")
    prompts = prompts_for(config.kinds, _style(config))
    progress(Event("annotate", 0, config.images * len(prompts), "preparing the open images"))
    _sweep(folder)
    pictures = _lay_out(config, folder)
    backend = backend or make_backend(config)
    made["made"]["model"] = backend.model  # a hub id may have been fetched only now
    write_whole(begun, (json.dumps(made, indent=1) + "\n").encode())
    with Ledger(folder / "ledger.sqlite") as ledger:
        work = _Work(config, folder, pictures, prompts, ledger, backend)
        failed = work.run(progress)
        _finish(work, failed)
    return Corpus.open(folder)


def _made(config: AnnotateConfig, backend: Backend | None) -> dict[str, Any]:
    """What a corpus depends on beyond its configuration: who answers, the prompts' versions, the pictures. None: not known here."""
    model = backend.model if backend is not None else None
    if backend is None and config.backend != "openai":
        from mllm_fl.annotate.backends.local import identity

        model = identity(config.backend)
    pictures: str | None = f"glyphs {glyph_cache.VERSION}"
    if config.source != "glyphs":
        root = Path(config.source.removeprefix("folder:"))
        pictures = _digest(root, _chosen(config, root)) if root.is_dir() else None
    return {
        "model": model,
        "prompts": {p.kind: p.version for p in prompts_for(config.kinds, _style(config))},
        "pictures": pictures,
    }


def _digest(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and bytes; a file that cannot be read counts as empty."""
    h = hashlib.sha256()
    for path in files:
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        h.update(f"{path.relative_to(root)} {hashlib.sha256(content).hexdigest()}\n".encode())
    return h.hexdigest()


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


def make_backend(config: AnnotateConfig) -> Backend:
    """The backend that ``annotate.backend`` names."""
    if config.backend == "openai":
        from mllm_fl.annotate.backends.openai import OpenAIBackend

        assert config.model is not None
        return OpenAIBackend(
            config.model, config.base_url, config.api_key_env, config.max_tokens, concurrency=config.concurrency,
            retries=config.retries, timeout=config.timeout, first_pause=config.first_pause,
        )  # fmt: skip
    from mllm_fl.annotate.backends.local import LocalBackend

    return LocalBackend(config.backend, max_tokens=config.max_tokens, batch_size=config.batch_size)


def _style(config: AnnotateConfig) -> str:
    return config.prompts if config.prompts != "auto" else "glyphs" if config.backend == "mini" else "instruct"


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


class _Work:
    """The questions of one corpus, and the loop that gets them answered."""

    def __init__(
        self,
        config: AnnotateConfig,
        folder: Path,
        pictures: _Open,
        prompts: Sequence[Prompt],
        ledger: Ledger,
        backend: Backend,
    ) -> None:
        self.folder, self.pictures, self.prompts, self.ledger, self.backend = folder, pictures, prompts, ledger, backend
        self.config = config
        self.questions: dict[Key, tuple[int, Prompt, tuple[str, ...]]] = {}
        for part in _chunks(range(len(pictures.paths)), backend.batch_size):
            for prompt in prompts:
                for i in part:
                    asked = prompt.questions(pictures.hashes[i])
                    parameters = canonical({**backend.parameters(), "questions": asked})
                    key = Key(pictures.hashes[i], prompt.kind, prompt.version, backend.model, parameters)
                    self.questions.setdefault(key, (i, prompt, asked))
        self.keys = list(self.questions)

    def run(self, progress: Progress) -> dict[Key, str]:
        """Ask until every question is answered or has failed once; returns the failures with their reasons."""
        failed: dict[Key, str] = {}
        done = len(self.ledger.answers(self.keys))
        while True:
            claimed_any = False
            for part in _chunks(self.keys, self.backend.batch_size):
                mine = self.ledger.claim([k for k in part if k not in failed])
                if mine:
                    claimed_any = True
                    failed |= self._ask(mine)
                    done += len(mine)
                    note = f"{len(failed)} failed" if failed else ""
                    progress(Event("annotate", min(done, len(self.keys)), len(self.keys), note))
            there = self.ledger.answers(self.keys)
            if all(k in there or k in failed for k in self.keys):
                progress(Event("annotate", len(self.keys), len(self.keys)))
                return failed
            if not claimed_any:  # the rest is in another process's hands
                time.sleep(0.2)

    def _ask(self, keys: Sequence[Key]) -> dict[Key, str]:
        failed: dict[Key, str] = {}
        requests = []
        for key in keys:
            i, prompt, asked = self.questions[key]
            requests.append(Request(self._image(i), asked, prompt.system))

        def deliver(answers: list[tuple[int, Entry]]) -> None:
            rows = []
            for at, entry in answers:
                key = keys[at]
                i, prompt, asked = self.questions[key]
                if entry.error is None:
                    try:
                        prompt.record("x", self.pictures.paths[i], asked, entry.texts)
                    except ValueError as e:
                        entry = Entry((), str(e), entry.prompt_tokens, entry.completion_tokens, entry.seconds)
                if entry.error is not None:
                    failed[key] = entry.error
                rows.append((key, entry))
            self.ledger.write(rows)

        self.backend.answer(requests, deliver)
        return failed

    def _image(self, i: int) -> Tensor:
        try:
            return torch.from_numpy(to_array(to_rgb(self.folder / self.pictures.paths[i])).copy())
        except ValueError as e:
            raise UserError(
                self.folder / self.pictures.paths[i], str(e), "delete it and run the same command"
            ) from None

    def records(self) -> list[Record]:
        """The records that the ledger's answers make, picture by picture."""
        there = self.ledger.answers(self.keys)
        by_place: dict[tuple[str, str], Key] = {(k.image, k.kind): k for k in self.keys}
        out = []
        for i, (path, sha) in enumerate(zip(self.pictures.paths, self.pictures.hashes, strict=True)):
            for prompt in self.prompts:
                key = by_place[sha, prompt.kind]
                if key in there:
                    out.append(prompt.record(f"{i:06d}-{prompt.kind}", path, self.questions[key][2], there[key]))
        return out


def _finish(work: _Work, failed: dict[Key, str]) -> None:
    """Write card.json, then records.json: its presence means that the corpus is finished."""
    records = work.records()
    if not records:
        reason = next(iter(failed.values()), "no questions")
        raise UserError(
            work.folder,
            f"not one of {len(work.keys)} annotations succeeded; the first failed with: {reason}",
            "check [annotate]",
        )
    reasons: dict[str, int] = {}
    for reason in failed.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    card = {
        "source": work.config.source, "seed": work.config.seed, "model": work.backend.model, "parameters": work.backend.parameters(),
        "images": len(work.pictures.paths), "unreadable": work.pictures.unreadable, "records": len(records),
        "kinds": {
            p.kind: {
                "prompt": p.version, "ok": sum(r.kind == p.kind for r in records), "failed": sum(k.kind == p.kind for k in failed),
                **work.ledger.usage([k for k in work.keys if k.kind == p.kind]),
            }
            for p in work.prompts
        },
        "failures": reasons,
        "agreement": agreement(records, work.pictures.scenes) if work.pictures.scenes else "not checked: no scene records",
    }  # fmt: skip
    write_whole(work.folder / "card.json", (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    save(records, work.folder / "records.json")


def _sweep(folder: Path) -> None:
    """Remove the half-written files of processes that died on this machine."""
    for leftover in folder.rglob(".*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not born(int(pid)):
            leftover.unlink(missing_ok=True)


def _lay_out(config: AnnotateConfig, folder: Path) -> _Open:
    """The open images as PNG files in the corpus folder; a file's name holds its hash, so one that is there is right."""
    paths: list[str] = []
    hashes: list[str] = []
    scenes: dict[str, dict[str, Any]] = {}
    unreadable: dict[str, str] = {}
    for i, (image, scene) in enumerate(_source(config, unreadable)):
        one = ImageSet("", MemoryPixels(image[None]), np.full(1, -1), ())
        sha = one.hashes()[0]
        path = f"images/{i:06d}-{sha[:12]}.png"
        if not (folder / path).exists():
            write_whole(folder / path, png(image))
        paths.append(path)
        hashes.append(sha)
        if scene is not None:
            scenes[path] = scene
    if not paths:
        why = next(iter(unreadable.items()), None)
        problem = f"no readable image (first: {why[0]}: {why[1]})" if why else "no image"
        raise UserError(config.source, problem, f"images end in {', '.join(EXTENSIONS)}")
    if scenes:
        lines = "".join(json.dumps({"image": p, **s}) + "\n" for p, s in scenes.items())
        write_whole(folder / "scenes.jsonl", lines.encode())
    return _Open(paths, hashes, scenes, unreadable)


def _source(config: AnnotateConfig, unreadable: dict[str, str]) -> Iterator[tuple[Tensor, dict[str, Any] | None]]:
    """The open images uint8 (3, h, w), with their scene where it is known; what cannot be read is noted and left out."""
    if config.source == "glyphs":
        images, found = render_glyphs(config.images, config.seed, image_size=config.image_size or 16)
        for i, scene in enumerate(found):
            yield images.read([i])[0], scene.to_json()
        return
    root = Path(config.source.removeprefix("folder:"))
    if not root.is_dir():
        raise UserError("annotate.source", f"{root} is not a folder", "give folder:PATH of the open images")
    for path in _chosen(config, root):
        try:
            drawn = to_rgb(path)
        except ValueError as e:
            unreadable[str(path.relative_to(root))] = str(e)
            continue
        if config.image_size is not None:
            drawn = fit(drawn, config.image_size)
        yield torch.from_numpy(to_array(drawn).copy()), None


def open_prints(config: AnnotateConfig, size: int) -> list[Prints] | None:
    """The open images' hashes for a leak check, before anybody is asked about them; None when their folder is not there.

    As stored: the files' own pixels, whatever ``image_size`` makes of them, or a rendered character's counts. As used: at ``size``.
    """
    if config.source == "glyphs":
        return list(prints(render_glyphs(config.images, config.seed, image_size=size)[0]))
    root = Path(config.source.removeprefix("folder:"))
    return _prints_of_files(_chosen(config, root), size) if root.is_dir() else None


def corpus_prints(corpus: Corpus, size: int) -> list[Prints]:
    """The same of a corpus that is there, whose source may be gone."""
    return _prints_of_files([corpus.folder / image for image in corpus.images], size)


def _prints_of_files(files: Sequence[Path], size: int) -> list[Prints]:
    def one(path: Path) -> Prints | None:
        try:
            picture = to_rgb(path)
        except ValueError:
            return None  # annotation lists it as unreadable
        return prints_of(to_array(picture), to_array(fit(picture, size)))

    with ThreadPoolExecutor(THREADS) as pool:
        return [p for p in pool.map(one, files) if p is not None]


def _chosen(config: AnnotateConfig, root: Path) -> list[Path]:
    """The image files below ``root`` that the corpus takes."""
    files = image_files(root)
    if len(files) > config.images:
        chosen = numpy_stream(config.seed, "open-images").permutation(len(files))[: config.images]
        files = [files[i] for i in sorted(int(j) for j in chosen)]
    return files
