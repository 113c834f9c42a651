"""Test images among the images that a run trains, aligns or pretrains on: counted in every run, refused unless declared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mllm_fl.annotate.corpus import Corpus
from mllm_fl.config import Config
from mllm_fl.data.check import known, leaks
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate import corpus_prints, open_prints
from mllm_fl.stages.pretraining.reading import records
from mllm_fl.stages.shared import corpus_path, federation_of, side_of


def leaks_of(config: Config, root: Path, federation: Federation, sets: Mapping[str, ImageSet | None]) -> dict[str, int]:
    """Test images among each set, and among the open images if the run pretrains: ``{"align/test": 0, ...}``.

    Raises:
        UserError: more than ``data.leaks_declared``.
    """
    test = known(federation.test)
    found = {f"{name}/test": leaks(images, test) for name, images in sets.items() if images is not None}
    if config.pretrain is not None:
        found["open/test"] = open_leaks(config, root, test)
    check_leaks(config, found)
    return found


def check_leaks(config: Config, found: dict[str, int]) -> None:
    """Refuse more test images than ``data.leaks_declared``; ``found``: how many in each set."""
    total = sum(found.values())
    if total > config.data.leaks_declared:
        raise UserError(
            "data.leaks_declared",
            f"{total} images are also in the test set ({', '.join(f'{k}: {v}' for k, v in found.items())})",
            f"remove them, or declare them: data.leaks_declared = {total}",
        )


def open_leaks(config: Config, root: Path, test: frozenset[str]) -> int:
    """How many open images are test images: of the source, or of the finished corpus when the source is gone."""
    ready = config.pretrain is not None and config.pretrain.corpus is not None
    if config.annotate is None and not ready:
        return 0  # refused by annotate_stage
    size = side_of(federation_of(config))
    found = open_prints(config.annotate, size) if config.annotate is not None and not ready else None
    if found is None:
        path = corpus_path(config, root)
        if ready:
            folder = path if path.is_dir() else path.parent
            found = corpus_prints(folder, dict.fromkeys(r.image for r in records(path)), size)
        elif (path / "records.json").exists():
            corpus = Corpus.open(path)
            found = corpus_prints(corpus.folder, corpus.images, size)
    return leaks(found or [], test)
