"""The committed corpus, from raw images to its card: ``python scripts/open_corpus.py`` after scripts/open_annotator.py (``make corpus`` runs both).

Every step is a command that a user has, and each finds what the one before it left: killed at any moment, the same command goes on. One thread, low priority.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_fl import cli
from mllm_fl.config import load
from mllm_fl.data.cifar import data_root
from mllm_fl.stages.shared import corpus_path

RUNS = Path("runs")
HOME = RUNS / "corpus"
CONFIG, GLYPHS = Path("experiments/corpus.toml"), Path("experiments/corpus_glyphs.toml")
PARTS = (  # name, data set, splits, first row, rows
    ("cifar100", "cifar100", ("train",), 40_000, 3_000),
    ("flickr8k", "flickr8k", ("validation", "test", "unassigned"), 0, None),
    ("shapes", "easy_vqa", ("test",), 0, None),
)
NOTES = (
    "Made by `make corpus` (configuration `experiments/corpus.toml`; nothing but this page is committed). The annotator is the small LLaVA of `scripts/open_annotator.py`: frozen tower of "
    "`scripts/cifar_teacher.py`, trained here on other images of the same three sources, sentences about CIFAR-100 made from labels. It stands in for a real multimodal LLM: what it says is often wrong, "
    "and this page is there to show that the checks see it. The CLIP that scores is the same tower, taught on CIFAR-10 alone, so its score says little about other pictures.",
    "Images are at most 64 x 64 pixels. Licences: easy-VQA MIT; Flickr8k research use only; CIFAR-100 has none that is formal.",
)


def staged(root: Path, folder: Path) -> None:
    """The chosen rows of each data set as one Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, splits, first, count in PARTS:
        out = folder / f"{name}.parquet"
        if not out.exists():
            table = pa.concat_tables(
                [pq.read_table(root / data / f"{s}-00000-of-00001.parquet") for s in splits]
            ).slice(first, count)
            pq.write_table(table, out.with_suffix(".new"))
            out.with_suffix(".new").rename(out)


def do(*words: str) -> None:
    """One command of mllm-fl; its failure ends the script."""
    print("$ mllm-fl " + " ".join(words), file=sys.stderr, flush=True)
    if status := cli.main(list(words)):
        sys.exit(status)


def main() -> None:
    """All steps."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--card", type=Path, default=Path("docs/corpus-card.md"))
    p.add_argument("--probes", type=int, default=100)
    args = p.parse_args()
    os.nice(1)
    staged(data_root(None, "cifar100"), HOME / "open")
    if not (HOME / "pool" / "truth.jsonl").exists():
        do("corpus", "import", str(HOME / "open"), str(HOME / "pool"))
    cards = []
    for config, title, annotator in (
        (CONFIG, "Corpus card", str(HOME / "annotator")),
        (GLYPHS, "Glyphs, by the bundled model", "mini"),
    ):
        folder = corpus_path(load(config).runs[0], RUNS)
        if not (folder / "records.json").exists():
            do("annotate", str(config), "--runs", str(RUNS))
        if not (folder / "quality.jsonl").exists():
            own = (
                ("--evaluation", "cifar10", "--clip", "runs/cifar-clip")
                if config == CONFIG
                else ("--evaluation", "digits", "--clip", "mini")
            )
            do(
                "corpus",
                "check",
                str(folder),
                *own,
                "--probe",
                annotator,
                "--probes",
                str(args.probes if config == CONFIG else 0),
            )
        notes = [w for n in (NOTES if config == CONFIG else ()) for w in ("--note", n)]
        part = HOME / f"{config.stem}.md"
        do(
            "corpus",
            "card",
            str(folder),
            "--title",
            title,
            "--out",
            str(part),
            "--sample",
            "16" if config == CONFIG else "6",
            *notes,
        )
        cards.append(part.read_text(encoding="utf-8"))
    args.card.write_text("\n".join(cards).replace("\n# Glyphs", "\n---\n\n# Glyphs"), encoding="utf-8")
    print(args.card)


if __name__ == "__main__":
    main()
