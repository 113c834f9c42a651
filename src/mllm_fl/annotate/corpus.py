"""The corpus: what stage 1a hands to stage 1b, a folder that a user can look at.

``records.json`` (LLaVA's form), ``images/`` (PNG files that the records name), ``card.json`` (what it is, counts, failures, agreement
with the truth where there is one), ``ledger.sqlite``, and for rendered pictures ``scenes.jsonl`` (a line per picture, in order).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_fl.annotate.records import Record, load
from mllm_fl.data.decode import fit, to_array, to_rgb
from mllm_fl.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """An opened corpus: ``images`` are the distinct paths that the records name, in their order."""

    folder: Path
    records: tuple[Record, ...]
    images: tuple[str, ...]
    card: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """The corpus in ``folder``, checked: records valid, every picture there.

        Raises:
            UserError: no corpus, unfinished, an invalid record, a missing picture, a path that leaves the folder (also by a link).
        """
        if not (folder / "records.json").exists():
            problem = (
                "the corpus is unfinished (no records.json)"
                if (folder / "ledger.sqlite").exists()
                else "no corpus here (no records.json)"
            )
            raise UserError(folder, problem, "run `mllm-fl annotate CONFIG`")
        records = load(folder / "records.json")
        if not records:
            raise UserError(folder / "records.json", "holds no record", "annotate at least one picture")
        root = folder.resolve()
        paths: dict[str, None] = {}
        for i, record in enumerate(records):
            if record.image in paths:
                continue
            path = (folder / record.image).resolve()
            if not path.is_relative_to(root):
                raise UserError(
                    f"{folder / 'records.json'}: record {i + 1}",
                    f"image {record.image!r} leads out of the folder",
                    "copy it into the folder",
                )
            if not path.is_file():
                raise UserError(
                    f"{folder / 'records.json'}: record {i + 1}",
                    f"image {record.image!r} is missing",
                    "restore it, or remove the record",
                )
            paths[record.image] = None
        return cls(folder, tuple(records), tuple(paths), _card(folder / "card.json"))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the records, and of the pictures' names and files: what a pretraining on this corpus depends on.

        Raises:
            UserError: a picture that cannot be read.
        """
        records = json.dumps([r.to_json() for r in self.records])
        pictures = hashlib.sha256()
        for image in self.images:
            try:
                content = (self.folder / image).read_bytes()
            except OSError as e:
                problem = f"cannot be read ({e.strerror})"
                raise UserError(self.folder / image, problem, "restore it, or remove its records") from None
            pictures.update(f"{image} {hashlib.sha256(content).hexdigest()}\n".encode())
        return {"records": hashlib.sha256(records.encode()).hexdigest(), "pictures": pictures.hexdigest()}

    def pixels(self, size: int | None = None) -> Tensor:
        """All pictures in the order of ``images``: uint8 (n, 3, size, size); ``size`` None keeps the first one's shorter side.

        Raises:
            UserError: a picture that cannot be decoded.
        """
        out: list[np.ndarray] = []
        for image in self.images:
            try:
                drawn = to_rgb(self.folder / image)
            except ValueError as e:
                raise UserError(self.folder / image, str(e), "restore it, or remove its records") from None
            size = size or min(drawn.size)
            out.append(to_array(fit(drawn, size)))
        return torch.from_numpy(np.stack(out))


def _card(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read ({e})", "delete it: it only describes the corpus") from None
    return card if isinstance(card, dict) else {}
