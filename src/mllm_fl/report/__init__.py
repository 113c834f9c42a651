"""What a reader sees of finished runs: the comparison table (no heavy import) and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["build"]


def build(runs: Sequence[Path], out: Path, *, title: str = "mllm-fl", corpus: Path | None = None) -> Path:
    """Write one self-contained HTML page about the runs and return its path.

    Args:
        runs: run folders. Unfinished ones are listed, but do not count; one at least must be finished.
        out: the file; it appears whole or not at all.
        corpus: the folder of stage 1's corpus, for a few annotated images.

    Raises:
        UserError: no finished run, an empty folder, a broken file (with its line), runs with different classes, matplotlib missing,
            a page that cannot be written.
    """
    from mllm_fl.report.document import write

    return write(runs, out, title, corpus)
