"""Any Hugging Face vision-language model on this machine as annotator, the bundled mini-LLaVA among them: batched greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from mllm_fl.annotate.backends.base import Deliver, Request
from mllm_fl.annotate.ledger import Entry
from mllm_fl.data.decode import to_rgb
from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.llava import quiet
from mllm_fl.models.teacher.located import fingerprint, locate

_Said = tuple[str, int, int, str | None]
"""(answer, tokens in, tokens out, problem) of one question about one picture."""


class LocalBackend:
    """``name``: "mini", a folder, or a hub id. ``max_tokens`` bounds each answer; one that reaches it is a failure.

    ``device``: "cpu", "cuda", "cuda:1", ...; None takes the graphics processor where there is one. The same pictures in the same
    batches give the same answers on one device. Batches hold equal questions, so nothing is padded there; a batch that does
    not fit into memory is halved, down to one picture.
    """

    def __init__(
        self, name: str = "mini", *, max_tokens: int = 64, batch_size: int = 64, device: str | None = None
    ) -> None:
        bridge_torchvision()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = locate(name)
        try:
            with quiet():
                self.processor: Any = AutoProcessor.from_pretrained(where, backend="pil")
                self._model: Any = AutoModelForImageTextToText.from_pretrained(where, dtype="auto")
        except (OSError, ValueError) as e:
            first = " ".join(str(e).split())[:200]
            raise UserError(
                name,
                f"cannot be loaded as a vision-language model ({first})",
                "give a complete folder, or a hub id and network",
            ) from None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._model.eval().requires_grad_(False).to(self.device)
        except (RuntimeError, AssertionError) as e:
            first = str(e).partition("\n")[0]
            raise UserError(
                f"annotate.device {device!r}", f"cannot be used ({first})", "leave it out, or cpu"
            ) from None
        self.processor.tokenizer.padding_side = "left"
        self.model = identity(name) or name
        self.max_tokens, self.batch_size, self._fits = max_tokens, batch_size, batch_size

    def parameters(self) -> dict[str, Any]:
        """Greedy decoding up to so many tokens."""
        return parameters_of(self.max_tokens)

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        """See :class:`Backend`. Requests are grouped by question, and each group is decoded in one batch."""
        start = time.perf_counter()
        wanted = list(requests)
        pictures: dict[int, Image.Image] = {}
        said: dict[tuple[int, int], _Said] = {}
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for i, request in enumerate(wanted):
            try:
                pictures[i] = to_rgb(request.image)
            except ValueError as e:
                said.update({(i, j): ("", 0, 0, str(e)) for j in range(len(request.questions))})
                continue
            said.update({(i, j): (text, 0, 0, None) for j, text in enumerate(request.done)})
            for j in range(len(request.done), len(request.questions)):
                groups.setdefault((request.system, request.questions[j]), []).append((i, j))
        for (system, question), places in groups.items():
            for at in range(0, len(places), self.batch_size):
                part = places[at : at + self.batch_size]
                found = self._fitting([pictures[i] for i, _ in part], self.prompt(system, question))
                said.update(zip(part, found, strict=True))
        each = (time.perf_counter() - start) / max(len(wanted), 1)
        out: list[tuple[int, Entry]] = []
        for i, request in enumerate(wanted):
            mine = [said[i, j] for j in range(len(request.questions))]
            error = next((e for *_, e in mine if e), None)
            texts = () if error else tuple(text for text, *_ in mine)
            asked = len(request.questions) - len(request.done) if i in pictures else 0
            read, written = sum(m[1] for m in mine), sum(m[2] for m in mine)
            out.append((i, Entry(texts, error, read, written, each, 0.0, asked, {"device": self.device.type})))
        deliver(out)

    def _fitting(self, images: Sequence[Image.Image], prompt: str) -> list[_Said]:
        """The answers of one batch, in halves if it does not fit into memory."""
        if len(images) > self._fits:
            half = len(images) // 2
            return self._fitting(images[:half], prompt) + self._fitting(images[half:], prompt)
        try:
            return self._generate(images, prompt)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                way_out = "use a smaller model, fewer annotate.max_tokens, or smaller pictures"
                raise UserError("annotate.backend", "not even one picture fits into memory", way_out) from None
            self._fits = len(images) // 2
        return self._fitting(images, prompt)

    @torch.no_grad()
    def _generate(self, images: Sequence[Image.Image], prompt: str) -> list[_Said]:
        inputs = self.processor(text=[prompt] * len(images), images=list(images), return_tensors="pt", padding=True).to(
            self.device
        )
        length = inputs["input_ids"].shape[1]
        out = self._model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        out = out[:, length:].cpu()
        eos = self._model.generation_config.eos_token_id
        ends = torch.tensor([eos] if isinstance(eos, int) else list(eos or []))
        stopped = torch.isin(out, ends)
        used = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, out.shape[1]).tolist()
        answers: list[tuple[str, int, int, str | None]] = []
        for row, n, done in zip(out, used, stopped.any(1).tolist(), strict=True):
            text = self.processor.decode(row[:n], skip_special_tokens=True).strip()
            problem = "answer cut off at max_tokens" if not done else None if text else "empty answer"
            answers.append((text, length, n, problem))
        return answers

    def prompt(self, system: str, question: str) -> str:
        """The model's own chat template, or LLaVA's plain form where it has none."""
        if getattr(self.processor, "chat_template", None):
            said: list[dict[str, Any]] = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            ]
            if system:
                said.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
            try:
                return self._templated(said)
            except Exception as e:  # jinja2's, whose templates refuse a system role by raising whatever they like
                if not system:
                    raise UserError(self.model, f"its chat template fails ({e})", "give annotate.prompts") from None
                said = said[1:]
                said[0]["content"][1]["text"] = f"{system}\n{question}"
                return self._templated(said)
        return f"{system} USER: <image>\n{question} ASSISTANT:".strip()

    def _templated(self, said: list[dict[str, Any]]) -> str:
        text: str = self.processor.apply_chat_template(said, add_generation_prompt=True)
        return text


def parameters_of(max_tokens: int) -> dict[str, Any]:
    """What an answer of a local model depends on beside the model."""
    return {"decoding": "greedy", "max_tokens": max_tokens}


def identity(name: str) -> str | None:
    """The model's name and eight digits that change when its files do, so that a ledger never mixes two; None: not on this machine."""
    digits = fingerprint(name)
    return None if digits is None else f"{'mini-llava' if name == 'mini' else name} {digits[:8]}"
