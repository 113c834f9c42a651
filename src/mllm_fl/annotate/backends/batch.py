"""OpenAI's Batch form: questions go up as files, answers come back as files within a day, at about half the price.

A file holds at most 50,000 requests and 200 MB (https://platform.openai.com/docs/guides/batch). What lies in a batch is claimed in the
ledger until the batch ends, so a killed process, or one that does not wait, is continued by the same command: it hands in what was
written, adopts what was handed in, fetches what is done, and hands in again what expired. One process at a time works on the batches of a folder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from mllm_fl.annotate.backends.base import encoded
from mllm_fl.annotate.backends.batch_lines import name_of, reply_of
from mllm_fl.annotate.backends.openai import OpenAIBackend
from mllm_fl.annotate.backends.replies import tokens
from mllm_fl.annotate.batches import Batch, Batches
from mllm_fl.annotate.engine import Limits, Outcome, Question
from mllm_fl.annotate.ledger import Entry, Key, Ledger
from mllm_fl.annotate.prices import image_tokens, request_tokens
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError
from mllm_fl.events import Event, Progress, silent

MOST, LARGEST = 50_000, 200_000_000  # requests and bytes of one file
POLL = 30.0  # seconds between two looks at the endpoint
RETRIES = 5
_OVER = ("completed", "expired", "cancelled", "failed")


def ask_batches(
    questions: Sequence[Question],
    ledger: Ledger,
    backend: OpenAIBackend,
    limits: Limits,
    folder: Path,
    progress: Progress = silent,
    *,
    wait: bool = True,
) -> Outcome:
    """Hand the open questions in, and fetch what is done; with ``wait``, until every question is answered or has failed.

    Raises:
        UserError: the endpoint refuses the key, the form or a file, or another process works on these batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(folder, "another process works on these batches", "wait for it") from None
    try:
        return _Work(questions, ledger, backend, limits, folder, progress).run(wait)
    finally:
        lock.release()


class _Work:
    def __init__(
        self, questions: Sequence[Question], ledger: Ledger, backend: OpenAIBackend, limits: Limits, folder: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self.questions = {q.key: q for q in questions}
        self.names = {name_of(key): key for key in self.questions}
        self.ledger, self.backend, self.limits, self.folder, self.progress = ledger, backend, limits, folder, progress
        self.batches = Batches(ledger)
        self.client, self.unsure = backend.client(max_retries=RETRIES), backend.client(max_retries=0)
        self.out = Outcome()
        self.look = True  # whether questions may be open that were not before
        self.missed: dict[Key, int] = {}  # how often a batch ended without a word about it

    def run(self, wait: bool) -> Outcome:
        for broken in self.batches.all("writing"):  # its writer is dead: this process has the lock
            self.batches.drop(broken)
        while True:
            for batch in self.batches.all("written", "uploaded", "submitted"):
                self._advance(batch)
            self._hand_in()
            at_work = self.batches.all("written", "uploaded", "submitted")
            self._show(at_work)
            if not at_work or not wait:
                self.out.waiting = len(at_work)
                return self.out
            time.sleep(POLL)

    def _hand_in(self) -> None:
        """Write the open questions into files, and hand each of them in as it is full."""
        if not self.look:
            return
        self.look, self.out.stopped = False, None
        lines = self._lines()
        line = next(lines, None)
        while line is not None:
            batch = self.batches.begin()
            path, size, count, cost = self.folder / f"{batch}.jsonl", 0, 0, 0.0
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                while line is not None:
                    key, body, calls, dear = line
                    if size and (size + len(body) > LARGEST or count + calls > MOST):
                        break
                    if not self._allowed(count + calls, cost + dear):
                        line = None
                        break
                    if self.ledger.claim([key], f"batch:{batch}"):
                        file.write(body)
                        size, count, cost = size + len(body), count + calls, cost + dear
                    line = next(lines, None)
                file.flush()
                os.fsync(file.fileno())
            if not count:
                part.unlink()
                self.batches.drop(Batch(batch, "writing"))
                return
            part.replace(path)
            self._advance(self.batches.set(batch, "written", requests=count, reserved=cost))

    def _allowed(self, calls: int, cost: float) -> bool:
        """Whether so many more calls fit under the caps if each answer is as long as it may be."""
        spent, held = self.ledger.totals(), self.batches.all("written", "uploaded", "submitted")
        caps = self.limits
        if caps.max_requests is not None and spent.requests + sum(b.requests for b in held) + calls > caps.max_requests:
            self.out.stopped = f"max_requests {caps.max_requests:,} ({spent.requests:,} answered calls so far)"
        if caps.max_cost is not None and spent.cost + sum(b.reserved for b in held) + cost > caps.max_cost:
            self.out.stopped = f"max_cost {caps.max_cost:g} ({spent.cost:.4g} spent so far)"
        return self.out.stopped is None

    def _lines(self) -> Iterator[tuple[Key, bytes, int, float]]:
        """Per open question: its lines, how many there are, and what they cost at most."""
        for key in list(self.questions):
            if key in self.out.failed or not self.ledger.open(key):
                continue
            question = self.questions[key]
            request = question.request(self.ledger.partial([key]).get(key, ()))
            try:
                kind, content = encoded(request.image, self.backend.max_side)
            except ValueError as e:
                self._fail(key, str(e))
                continue
            picture = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            lines = []
            for j in range(len(request.done), len(request.questions)):
                body = self.backend.body(request, self.backend.messages(request, request.questions[j], picture))
                line = {
                    "custom_id": f"{name_of(key)}-{j}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
                lines.append(json.dumps(line).encode() + b"\n")
            whole = b"".join(lines)
            if len(whole) > LARGEST:
                self._fail(key, f"{len(whole):,} bytes are more than a batch file may have")
                continue
            with Image.open(io.BytesIO(content)) as found:
                seen = image_tokens(*found.size)
            dear = 0.0
            if self.limits.price is not None:
                asked = request_tokens(request.system, request.questions[len(request.done) :], seen)
                dear = self.limits.price.cost(asked, self.backend.max_tokens * len(lines), batch=True)
            yield key, whole, len(lines), dear

    def _advance(self, batch: Batch) -> None:
        """One step on: upload, hand in, fetch."""
        if batch.state == "written":
            with (self.folder / f"{batch.id}.jsonl").open("rb") as file:
                sent = self._call(lambda: self.client.files.create(file=file, purpose="batch"))
            batch = self.batches.set(batch.id, "uploaded", file=sent.id)
        if batch.state == "uploaded":
            mine = self._handed_in(batch)
            batch = self.batches.set(batch.id, "submitted", batch=mine.id)
            return
        there = self._call(lambda: self.client.batches.retrieve(batch.batch))
        if there.status in _OVER:
            self._merge(batch, there)

    def _handed_in(self, batch: Batch) -> Any:
        """The endpoint's batch of this file: made now, or adopted if a process that died, or a lost reply, left it there."""
        for attempt in range(RETRIES + 1):
            mine = self._call(lambda: next((b for b in self.client.batches.list() if _mark(b) == batch.id), None))
            if mine is not None:
                return mine
            try:
                return self.unsure.batches.create(
                    input_file_id=batch.file, endpoint="/v1/chat/completions", completion_window="24h",
                    metadata={"mllm_fl": batch.id},
                )  # fmt: skip
            except self.backend.errors.APIError as e:
                found = e
                code = getattr(e, "status_code", 500)
                if code < 500 and code not in (408, 409, 429):
                    break
                time.sleep(min(2**attempt, 30) if attempt < RETRIES else 0)
        return self._call(lambda: _raise(found))

    def _merge(self, batch: Batch, there: Any) -> None:
        """Write what the batch says into the ledger, all at once; what it does not say is open again."""
        found: dict[Key, dict[int, Any]] = {}
        for name in ("output_file_id", "error_file_id"):
            if getattr(there, name, None):
                for key, j, line in self._fetched(batch, getattr(there, name), name.partition("_")[0]):
                    found.setdefault(key, {})[j] = line
        entries = [(key, entry) for key, lines in found.items() if (entry := self._entry(key, lines)) is not None]
        self.ledger.write(entries, merged=batch.id)
        for key, entry in entries:
            if entry.error is not None:
                self.out.failed[key] = entry.error
        for key in self.ledger.held(f"batch:{batch.id}"):
            self.missed[key] = self.missed.get(key, 0) + 1
            if self.missed[key] > 1:
                self.out.failed[key] = "two batches ended without an answer to it"
        self.ledger.release(f"batch:{batch.id}")
        self.look = True
        (self.folder / f"{batch.id}.jsonl").unlink(missing_ok=True)
        if there.status == "failed" and not entries:
            said = getattr(getattr(there, "errors", None), "data", None) or [SimpleNamespace(message="no reason given")]
            raise UserError(
                f"batch {there.id}", f"refused by the endpoint: {said[0].message}", "mend it and run the same command"
            )

    def _fetched(self, batch: Batch, file: str, what: str) -> Iterator[tuple[Key, int, dict[str, Any]]]:
        content = self._call(lambda: self.client.files.content(file).read())
        write_whole(self.folder / f"{batch.id}.{what}.jsonl", content)
        for text in content.decode("utf-8", "replace").split("\n"):
            try:
                line = json.loads(text)
                name, _, j = str(line["custom_id"]).rpartition("-")
                if name in self.names:
                    yield self.names[name], int(j), line
            except (ValueError, KeyError, TypeError):
                continue  # a line that is no answer: its question is open again

    def _entry(self, key: Key, lines: dict[int, Any]) -> Entry | None:
        """What the lines of one record make; None when all of them expired, and nothing was paid."""
        question = self.questions[key]
        texts, used = list(self.ledger.partial([key]).get(key, ())), [0, 0, 0]
        error, served = None, {}
        for j in range(len(texts), len(question.asked)):
            text, problem, reply = reply_of(lines.get(j))
            if reply is not None:
                more = tokens(reply, question.asked[j], text)
                used = [used[0] + more[0], used[1] + more[1], used[2] + 1]
                served = {"batch": True, "served": getattr(reply, "model", None), "id": getattr(reply, "id", None)}
            error = error or problem
            if error is None:
                texts.append(text)
        if error == "expired":  # what came is kept, the rest is asked for again
            if not used[2]:
                return None
            error = None
        elif error is None and (fault := question.fault(texts)):
            error, texts = fault, []
        price = self.limits.price
        return Entry(
            tuple(texts), error, used[0], used[1], 0.0, None if price is None else price.cost(used[0], used[1], batch=True), used[2], served,
            partial=error is None and len(texts) < len(question.asked), source=question.source, licence=question.licence,
        )  # fmt: skip

    def _fail(self, key: Key, why: str) -> None:
        question = self.questions[key]
        self.ledger.write([(key, Entry(error=why, source=question.source, licence=question.licence))])
        self.out.failed[key] = why

    def _call(self, do: Callable[[], Any]) -> Any:
        """The client's answer, or its refusal in one line."""
        try:
            return do()
        except self.backend.errors.APIStatusError as e:
            problem, way_out = f"HTTP {e.status_code}: {e.message}", "does this endpoint have OpenAI's Batch form?"
        except self.backend.errors.APIError as e:
            problem, way_out = str(e.__cause__ or e), "what was handed in is remembered; run the same command later"
        raise UserError(f"annotate.base_url {self.backend.base_url or '(default)'}", problem, way_out)

    def _show(self, at_work: Sequence[Batch]) -> None:
        there = sum(1 for _ in self.ledger.answered(self.questions))
        note = f"{len(at_work)} batches at work, {sum(b.requests for b in at_work):,} requests"
        done = min(there + len(self.out.failed), len(self.questions))
        self.progress(Event("annotate", done, len(self.questions), note if at_work else ""))


def _raise(e: Exception) -> None:
    raise e


def _mark(batch: Any) -> str | None:
    return (getattr(batch, "metadata", None) or {}).get("mllm_fl")
