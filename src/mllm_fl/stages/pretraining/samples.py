"""The corpus as a stream: read once from its file, indexed on disk, shuffled by a named stream; pictures and tokens are never all in memory.

``index.arrow`` in the pretraining's folder holds a row a record (text, picture, length in tokens, how many are predicted) and is memory-mapped:
a batch costs its own records and pictures. Decoded pictures are kept up to :data:`KEEP` bytes, which is all of a small corpus.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mllm_fl.annotate.records import Record
from mllm_fl.data.decode import THREADS, fit, to_array, to_rgb
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent
from mllm_fl.models.teacher.conversation import Sample, encode
from mllm_fl.models.teacher.llava import Blueprint
from mllm_fl.seeds import stream
from mllm_fl.stages.pretraining.reading import numbered, records_file

KEEP = 256 << 20  # bytes of decoded pictures
ROWS = 4096
TEXTS = 4096  # conversations in tokens that are kept


@dataclass(frozen=True)
class Index:
    """The memory-mapped rows of a corpus. ``first``: the row in which each distinct picture comes first."""

    root: Path
    rows: Any
    first: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, shape (records,)."""
        out: np.ndarray = self.rows.column(name).to_numpy()
        return out

    def value(self, name: str, row: int) -> str:
        """A cell of text."""
        return str(self.rows.column(name)[row].as_py())


def make_index(
    corpus: Path, file: Path, plan: Blueprint, max_tokens: int, form: Literal["chat", "plain"], text: bool = True,
    progress: Progress = silent,
) -> None:  # fmt: skip
    """Write ``file``: a row a record, every conversation put into tokens once and checked. ``text`` False: pictures alone are needed.

    Raises:
        UserError: what :func:`records` and :func:`mllm_fl.models.teacher.conversation.encode` refuse.
    """
    import pyarrow as pa

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.string()),
            ("turns", pa.string()),
            ("picture", pa.int64()),
            ("tokens", pa.int64()),
            ("predicted", pa.int64()),
        ]
    )
    rows: list[dict[str, Any]] = []
    written = Written(plan, max_tokens, form)
    part = file.with_name(f".{file.name}.part")
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for i, (r, (picture, _)) in enumerate(numbered(corpus)):
            sample = written.of(pairs(r), f"{corpus}: record {r.id}") if text else None
            rows.append(
                {
                    "id": r.id, "image": r.image, "turns": json.dumps([t.text for t in r.turns]), "picture": picture,
                    "tokens": len(sample.ids) if sample else 0, "predicted": sample.predicted if sample else 0,
                }
            )  # fmt: skip
            if len(rows) == ROWS:
                writer.write(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
                progress(Event("pretrain", 0, 0, f"{i + 1:,} records read"))
        if rows:
            writer.write(pa.RecordBatch.from_pylist(rows, schema))
    part.replace(file)


def open_index(corpus: Path, file: Path) -> Index:
    """The index that :func:`make_index` wrote, memory-mapped."""
    import pyarrow as pa

    rows = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    _, first = np.unique(rows.column("picture").to_numpy(), return_index=True)
    return Index(records_file(corpus).parent, rows, first)


class Written:
    """Conversations in tokens; the last :data:`TEXTS` different ones are kept, since short captions are often equal."""

    def __init__(self, plan: Blueprint, max_tokens: int, form: Literal["chat", "plain"]) -> None:
        self._plan, self._max_tokens, self._form = plan, max_tokens, form
        self._kept: OrderedDict[tuple[tuple[str, str], ...], Sample] = OrderedDict()

    def of(self, turns: Sequence[tuple[str, str]], place: str) -> Sample:
        """See :func:`mllm_fl.models.teacher.conversation.encode`, which refuses by the name ``place``."""
        key = tuple(turns)
        sample = self._kept.pop(key, None)
        if sample is None:
            sample = encode(self._plan, turns, self._max_tokens, place, self._form)
        self._kept[key] = sample
        if len(self._kept) > TEXTS:
            self._kept.popitem(last=False)
        return sample


def pairs(record: Record) -> list[tuple[str, str]]:
    """(question, answer) of each turn."""
    said = [t.text for t in record.turns]
    return list(zip(said[::2], said[1::2], strict=True))


@dataclass(frozen=True)
class Batch:
    """What one process reads for a step. ``rows``: which records; ``pictures``: numbers of their pictures; ``student``: uint8 (n, 3, s, s);
    ``shown``: the same for the teacher (n, 3, t, t), or None; ``samples``: of the first so many, in tokens."""

    rows: Tensor
    pictures: Tensor
    student: Tensor
    shown: Tensor | None
    samples: list[Sample]


class Stream:
    """Batches of a corpus. ``sizes``: pixels a side for the compact model, and for the teacher."""

    def __init__(
        self,
        index: Index,
        plan: Blueprint,
        sizes: tuple[int | None, int],
        *,
        seed: int,
        pictures_only: bool,
        max_tokens: int,
        form: Literal["chat", "plain"],
    ) -> None:
        self.index, self.seed = index, seed
        picture = index.column("picture")
        self.rows = torch.from_numpy(index.first.copy() if pictures_only else np.arange(len(picture)))
        self.picture_of = torch.from_numpy(picture[self.rows.numpy()].copy())
        self.predicted = torch.from_numpy(index.column("predicted")[self.rows.numpy()].copy())
        self.pictures = len(index.first)
        self._written = Written(plan, max_tokens, form)
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._bytes = 0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        student = sizes[0] if sizes[0] is not None else min(self._open(0).size)
        self.sizes = (student, sizes[1])

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self, step: int, batch_size: int) -> Tensor:
        """Positions of a step's samples: permutations of all of them, one after the other, cut into batches."""
        n, out = len(self), []
        for p in range(step * batch_size, (step + 1) * batch_size):
            if self._order[0] != p // n:
                self._order = (p // n, torch.randperm(n, generator=stream(self.seed, "pretrain-order", p // n)))
            out.append(self._order[1][p % n])
        return torch.stack(out)

    def read(self, positions: Tensor, *, text: int, shown: bool) -> Batch:
        """The samples at these positions; the first ``text`` of them in tokens, with the teacher's pictures if they are to be ``shown``."""
        pictures = self.picture_of[positions]
        numbers = pictures.tolist()
        student = self.decoded(numbers, self.sizes[0])
        for_teacher = None
        if shown:
            same = self.sizes[0] == self.sizes[1]
            for_teacher = student if same else self.decoded(numbers, self.sizes[1])
        return Batch(positions, pictures, student, for_teacher, [self.sample(int(p)) for p in positions[:text]])

    def sample(self, position: int) -> Sample:
        """One conversation in tokens."""
        row = int(self.rows[position])
        said = json.loads(self.index.value("turns", row))
        turns = list(zip(said[::2], said[1::2], strict=True))
        place = f"{self.index.root}: record {self.index.value('id', row)}"
        return self._written.of(turns, place)

    def decoded(self, pictures: Sequence[int], size: int) -> Tensor:
        """Pictures by their number, the shorter side at ``size`` pixels and the middle cut out: uint8 (n, 3, size, size)."""
        missing = [i for i in dict.fromkeys(pictures) if (i, size) not in self._kept]
        read: dict[int, np.ndarray] = {}
        if len(missing) > 8 and THREADS > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                read = dict(zip(missing, pool.map(lambda i: to_array(fit(self._open(i), size)), missing), strict=True))
        else:
            read = {i: to_array(fit(self._open(i), size)) for i in missing}
        out = [read[i] if i in read else self._kept[i, size] for i in pictures]
        for i, array in read.items():
            if self._bytes + array.nbytes <= KEEP:
                self._kept[i, size] = array
                self._bytes += array.nbytes
        return torch.from_numpy(np.stack(out))

    def _open(self, picture: int) -> Any:
        path = self.index.root / self.index.value("image", int(self.index.first[picture]))
        try:
            return to_rgb(path)
        except ValueError as e:
            raise UserError(path, str(e), "restore it, or remove its records") from None
