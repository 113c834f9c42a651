"""The table of methods: what each is, what it changes, sends and needs, read from the classes and their modules' first lines."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mllm_fl.algorithms import METHODS, find
from mllm_fl.algorithms.base import Algorithm, Task
from mllm_fl.conformance.spy import HOOKS
from mllm_fl.models.network import ModelConfig, Network

CLASSES = (10, 100)
WIDTH = 64


class Entry(NamedTuple):
    """One method's line. Bytes are what one client sends or receives beyond weights, in a round (or once, where it says so)."""

    name: str
    title: str
    authors: str
    paper: str
    year: int
    arxiv: str
    hooks: tuple[str, ...]
    upload_bytes: tuple[int, ...]
    download_bytes: tuple[int, ...]
    uploads: str
    downloads: str
    needs: tuple[str, ...]
    neutral: dict[str, object]
    post_hoc: bool


def entries(names: Sequence[str] | None = None) -> list[Entry]:
    """The lines of these methods, or of all, in the order of METHODS."""
    tasks = [paper_task(c) for c in CLASSES]
    return [entry(name, tasks) for name in names or METHODS]


def paper_task(classes: int) -> Task:
    """The paper's network for this many classes, as structure only: no memory is spent on its weights."""
    with torch.device("meta"):
        net = Network(ModelConfig(width=WIDTH), classes)
    return Task(net, tuple(map(str, range(classes))), (1,) * 20, 0)


def entry(name: str, tasks: Sequence[Task]) -> Entry:
    """One method's line; ``upload_bytes`` of a client that holds images of every class."""
    cls = find(name)
    title, authors, paper, year, arxiv = heading(cls)
    method = cls()
    return Entry(
        name=name,
        title=title,
        authors=authors,
        paper=paper,
        year=year,
        arxiv=arxiv,
        hooks=tuple(h for h in HOOKS if getattr(cls, h) is not getattr(Algorithm, h)),
        upload_bytes=tuple(method.upload_bytes(t, len(t.class_names)) for t in tasks),
        download_bytes=tuple(method.download_bytes(t) for t in tasks),
        uploads=cls.uploads,
        downloads=cls.downloads,
        needs=cls.needs,
        neutral=dict(cls.neutral),
        post_hoc=not {"broadcast", "begin", "objective", "correct", "finish", "server"}
        & {h for h in HOOKS if getattr(cls, h) is not getattr(Algorithm, h)},
    )


def heading(cls: type[Algorithm]) -> tuple[str, str, str, int, str]:
    """(title, authors, paper, year, arXiv number) from the first lines of the module's docstring; parts it lacks are empty or 0.

    The first line is the title; the first paragraph with an arXiv number is ``Authors: Paper, year, arXiv:number``.
    """
    text = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    paragraphs = [" ".join(p.split()) for p in text.strip().split("\n\n")]
    title = paragraphs[0].rstrip(".") if cls.__name__ != "FedAvg" else "FedAvg"
    source = next((p for p in paragraphs if "arXiv:" in p), "")
    head = source.partition("arXiv:")[0].rstrip(", ")
    numbers = re.findall(r"arXiv:(\d{4}\.\d{4,5})", source)
    years = re.findall(r"\b(?:19|20)\d\d\b", head)
    authors, _, paper = head.partition(": ")
    paper = re.sub(r",? *(?:19|20)\d\d\b.*$", "", paper)
    return title, authors, paper, int(years[-1]) if years else 0, numbers[0] if numbers else ""


def neutral_words(e: Entry) -> str:
    """``mu=0``; of a method that is FedAvg itself, a dash."""
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in e.neutral.items()) or "-"


def size(n: int) -> str:
    """Bytes to three digits: ``0``, ``40``, ``4.91M``."""
    if n < 1000:
        return str(n)
    for unit, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if n < 999.5 * factor:
            return f"{n / factor:.3g}{unit}"
    return f"{n / 1e12:.3g}T"


def render(lines: Sequence[Entry], width: int = 80) -> str:
    """The table for a terminal, no line longer than ``width``."""
    head = ("method", "paper", "hooks", "upload", "needs", "neutral")
    room = (15, 10, 15, 10, 10, width - 65)
    rows = []
    for e in lines:
        upload = "-" if not any(e.upload_bytes) else " ".join(map(size, e.upload_bytes))
        cells = (
            e.name,
            f"{e.year or ''} {e.arxiv}".strip(),
            ", ".join(e.hooks) or "-",
            upload,
            ", ".join(e.needs) or "-",
            neutral_words(e),
        )
        rows.append([textwrap.wrap(c, r) or [""] for c, r in zip(cells, room, strict=True)])
    out = [" ".join(h.ljust(r) for h, r in zip(head, room, strict=True)).rstrip()]
    for wrapped in rows:
        for i in range(max(map(len, wrapped))):
            parts = ((c[i] if i < len(c) else "").ljust(r) for c, r in zip(wrapped, room, strict=True))
            out.append(" ".join(parts).rstrip())
    notes = (
        f"upload: bytes that a client with images of every class sends in a round beyond weights, ResNet-8 of width {WIDTH},"
        f" {CLASSES[0]} and {CLASSES[1]} classes. neutral: under these values the method is FedAvg bit for bit."
        " `mllm-fl check-method METHOD` proves it; `mllm-fl methods --markdown` says more."
    )
    return "\n".join([*out, "", *textwrap.wrap(notes, width)])


def markdown(costs: Path | None = None) -> str:
    """The page docs/methods.md; ``costs`` is the file of measured costs, whose table is left out where it is not given."""
    lines = entries()
    page = [
        "# Methods",
        "",
        "<!-- written by `mllm-fl methods --markdown > docs/methods.md`; do not edit -->",
        "",
        '`algorithm = "NAME"` in a configuration\'s `[federate]`; fields of the method go into `[federate.method]`. Each file under'
        " `src/mllm_fl/algorithms/` opens with its paper, its update rule, and what we changed and why.",
        "",
        "| name | method | hooks it overrides | needs | neutral value (FedAvg bit for bit) |",
        "|---|---|---|---|---|",
    ]
    page += [
        f"| `{e.name}` | {_cited(e)} | {', '.join(f'`{h}`' for h in e.hooks) or 'none'} | {', '.join(e.needs) or 'nothing'}"
        f" | {f'`{neutral_words(e)}`' if e.neutral else 'it is FedAvg'} |"
        for e in lines
    ]
    page += [
        "",
        f"## What travels beside the weights\n\nBytes of one client with images of every class, ResNet-8 of width {WIDTH},"
        f" {CLASSES[0]} and {CLASSES[1]} classes; the weights themselves are {_weights()} bytes each way. `check-method` counts them.",
        "",
        "| name | up | bytes up | down | bytes down |",
        "|---|---|---|---|---|",
    ]
    page += [
        f"| `{e.name}` | {_cell(e.uploads)} | {_both(e.upload_bytes)} | {_cell(e.downloads)} | {_both(e.download_bytes)} |"
        for e in lines
        if any((*e.upload_bytes, *e.download_bytes))
    ]
    silent = [f"`{e.name}`" for e in lines if not any((*e.upload_bytes, *e.download_bytes))]
    page += ["", f"Nothing: {', '.join(silent)}."]
    if costs is not None:
        page += ["", *_cost_table(costs)]
    return "\n".join(page)


def _cited(e: Entry) -> str:
    who = f"{e.authors.partition(',')[0]} et al." if "," in e.authors else e.authors
    return f"{e.title}: {who} {e.year}, {e.paper}, [arXiv:{e.arxiv}](https://arxiv.org/abs/{e.arxiv})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _both(counts: Sequence[int]) -> str:
    return " / ".join(f"{n:,}" for n in counts) if any(counts) else "0"


def _weights() -> str:
    nets = (paper_task(c).net for c in CLASSES)
    return " / ".join(f"{sum(v.numel() * v.element_size() for v in net.state_dict().values()):,}" for net in nets)


def _cost_table(costs: Path) -> list[str]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in costs.read_text(encoding="utf-8").splitlines()]
    first = rows[0]
    base = next(r for r in rows if r["method"] == "fedavg")
    out = [
        "## What it costs: Table 1 of the paper, measured",
        "",
        f"`python scripts/method_costs.py` on {first['processor']}, one thread, commit {first['commit']}, seed {first['seed']}: {first['setting']}."
        f" Seconds are the processor's, not the clock's, because the machine was shared; medians of {first['repeats']} interleaved rounds."
        " Client: one client's local round, FLOP from `torch.utils.flop_counter`"
        " (forward and backward passes; element-wise work is not counted). Server: its step after a round, aggregation included.",
        "",
        "| name | bytes up beyond weights | client, s | over FedAvg, s | client, GFLOP | over FedAvg | server, s | server, GFLOP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        extra = r["client_flop"] - base["client_flop"]
        out.append(
            f"| `{r['method']}` | {r['bytes_up']:,} | {r['client_seconds']:.2f} | {r['client_seconds'] - base['client_seconds']:+.2f}"
            f" | {r['client_flop'] / 1e9:.1f} | {extra / base['client_flop']:+.1%} | {r['server_seconds']:.2f} | {r['server_flop'] / 1e9:.1f} |"
        )
    return out
