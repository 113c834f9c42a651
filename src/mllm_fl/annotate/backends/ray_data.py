"""The same annotator on many machines: Ray Data hands requests to actors, and each actor has a backend of its own.

Placing the actors, and asking again what a lost one held, is Ray's work (``pip install 'mllm-fl[ray]'``). Ledger, caps, checks and progress stay with the
command that started it: an answer is in the ledger as soon as its batch is back, so that the ledger is the checkpoint, and a killed command goes on
as it always does. Starting Ray takes its time (docs/annotation.md has the numbers): worth it from thousands of pictures on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_fl.annotate.backends.base import Backend, Deliver, Request
from mllm_fl.annotate.ledger import Entry
from mllm_fl.errors import UserError

STOP = -1  # in the place of a position: the backend can answer nothing more


class RayBackend:
    """``actors`` Ray actors, each with the backend that ``make`` makes there; ``inner`` requests go to one at a time.

    ``model`` and ``parameters``: those of the backend inside, for the ledger: where it runs changes no answer. ``gpus``: of each actor, may be a part of one.
    ``part``: how many requests make one pipeline of Ray, whose actors load their model anew. A Ray that runs already is found through
    ``RAY_ADDRESS``; otherwise one is started on this machine. Pictures go as paths: every machine must see the corpus's folder.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(
        self, make: Callable[[], Backend], model: str, parameters: dict[str, Any], inner: int, actors: int, gpus: float = 0.0,
        part: int = 20_000,
    ) -> None:  # fmt: skip
        if not installed():
            raise UserError("annotate.actors", "Ray is not installed", "pip install 'mllm-fl[ray]', or leave it out")
        self.model, self.batch_size = model, part
        self._make, self._parameters, self._inner, self._actors, self._gpus = make, parameters, inner, actors, gpus

    def parameters(self) -> dict[str, Any]:
        """Those of the backend inside."""
        return self._parameters

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        """See :class:`Backend`. Delivers a batch as soon as an actor has answered it, whatever the order."""
        rows = [row_of(at, request) for at, request in enumerate(requests)]
        if not rows:
            return
        data = _data(self._actors)
        asked = data.from_items(rows, override_num_blocks=-(-len(rows) // self._inner)).map_batches(
            Actor, fn_constructor_args=(self._make,), batch_size=self._inner, batch_format="pyarrow", num_cpus=1, num_gpus=self._gpus,
            compute=data.ActorPoolStrategy(size=self._actors),
        )  # fmt: skip
        try:
            for block in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                found = block.to_pylist()
                deliver([(r["at"], _entry(r["said"])) for r in found if r["at"] != STOP])
                for r in found:
                    if r["at"] == STOP:
                        raise UserError(*r["said"].split(": ", 1))
        except lost() as e:
            first = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__).strip()
            way_out = "what was answered is kept: run the same command when Ray works again"
            raise UserError("annotate.actors", f"Ray gave up ({first[:160]})", way_out) from None


class Actor:
    """One backend, made where it works. Called with requests as :func:`row_of` writes them, it returns every delivery as a row."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._backend: Backend | None = None
        self._refusal: UserError | None = None
        try:
            self._backend = make()
        except UserError as e:  # raised here, it would reach the user as a page of Ray's
            self._refusal = e

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        rows, out = batch.to_pylist(), list[tuple[int, str]]()

        def deliver(found: list[tuple[int, Entry]]) -> None:
            out.extend((rows[i]["at"], json.dumps(asdict(e), ensure_ascii=True)) for i, e in found)

        try:
            if self._backend is None:
                assert self._refusal is not None
                raise self._refusal
            self._backend.answer([request_of(r) for r in rows], deliver)
        except UserError as e:
            out.append((STOP, str(e)))
        return pa.table({"at": pa.array([a for a, _ in out], pa.int64()), "said": [s for _, s in out]})


def row_of(at: int, request: Request) -> dict[str, Any]:
    """A request as plain values, with its position."""
    stored = isinstance(request.image, Path)
    about = {
        "questions": request.questions, "system": request.system, "schema": request.schema, "done": request.done, "fault": request.fault,
    }  # fmt: skip
    return {
        "at": at, "path": str(Path(request.image).resolve()) if isinstance(request.image, Path) else "",
        "content": b"" if stored else request.image, "about": json.dumps(about),
    }  # fmt: skip


def request_of(row: dict[str, Any]) -> Request:
    """The request that :func:`row_of` wrote."""
    about = json.loads(row["about"])
    return Request(
        Path(row["path"]) if row["path"] else bytes(row["content"]), tuple(about["questions"]), about["system"], about["schema"],
        tuple(about["done"]), about["fault"],
    )  # fmt: skip


def installed() -> bool:
    """Whether Ray is there."""
    return importlib.util.find_spec("ray") is not None


def lost() -> type[Exception]:
    """What Ray raises when it gives up."""
    found: type[Exception] = importlib.import_module("ray.exceptions").RayError
    return found


def _entry(said: str) -> Entry:
    values = json.loads(said)
    return Entry(**{**values, "texts": tuple(values["texts"])})


def _data(actors: int) -> Any:
    """``ray.data``, with a Ray that runs and is silent."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about the user's work goes anywhere unasked
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        mine = (
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, actors + 2)}
        )  # reading takes a core beside
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **mine)
        except (ConnectionError, RuntimeError, ValueError) as e:
            first = str(e).strip().partition("\n")[0][:160]
            raise UserError(
                "annotate.actors", f"Ray does not start ({first})", "check RAY_ADDRESS, or leave it out"
            ) from None
    try:
        data = importlib.import_module("ray.data")
    except ImportError as e:
        raise UserError("annotate.actors", f"Ray Data is not installed ({e})", "pip install 'mllm-fl[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    return data
