"""Any Hugging Face vision-language model on this machine as annotator, the bundled mini-LLaVA among them: batched greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_fl.annotate.backends.base import Deliver, Request, picture
from mllm_fl.annotate.ledger import Entry
from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.llava import fingerprint, locate, quiet


class LocalBackend:
    """``name``: "mini", a folder, or a hub id. ``max_tokens`` bounds each answer; one that reaches it is a failure.

    The same pictures in the same batches give the same answers. Batches hold equal questions, so nothing is padded there.
    """

    def __init__(self, name: str = "mini", *, max_tokens: int = 64, batch_size: int = 64) -> None:
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
        self._model.eval().requires_grad_(False)
        self.processor.tokenizer.padding_side = "left"
        self.model = identity(name) or name
        self.max_tokens, self.batch_size = max_tokens, batch_size

    def parameters(self) -> dict[str, Any]:
        """Greedy decoding up to so many tokens."""
        return {"decoding": "greedy", "max_tokens": self.max_tokens}

    def answer(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """See :class:`Backend`. Requests are grouped by question, and each group is decoded in one batch."""
        start = time.perf_counter()
        asked = [(i, j) for i, r in enumerate(requests) for j in range(len(r.questions))]
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for i, j in asked:
            groups.setdefault((requests[i].system, requests[i].questions[j]), []).append((i, j))
        said: dict[tuple[int, int], tuple[str, int, int, str | None]] = {}
        for (system, question), places in groups.items():
            for at in range(0, len(places), self.batch_size):
                part = places[at : at + self.batch_size]
                said.update(
                    zip(part, self._generate([requests[i].image for i, _ in part], system, question), strict=True)
                )
        each = (time.perf_counter() - start) / max(len(requests), 1)
        out: list[tuple[int, Entry]] = []
        for i, request in enumerate(requests):
            mine = [said[i, j] for j in range(len(request.questions))]
            error = next((e for *_, e in mine if e), None)
            texts = () if error else tuple(text for text, *_ in mine)
            out.append((i, Entry(texts, error, sum(m[1] for m in mine), sum(m[2] for m in mine), each)))
        deliver(out)

    @torch.no_grad()
    def _generate(self, images: Sequence[Tensor], system: str, question: str) -> list[tuple[str, int, int, str | None]]:
        """(answer, tokens in, tokens out, problem) per picture."""
        prompt = self.prompt(system, question)
        inputs = self.processor(
            text=[prompt] * len(images), images=[picture(x) for x in images], return_tensors="pt", padding=True
        )
        length = inputs["input_ids"].shape[1]
        out = self._model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)[:, length:]
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
            text: str = self.processor.apply_chat_template(said, add_generation_prompt=True)
            return text
        return f"{system} USER: <image>\n{question} ASSISTANT:".strip()


def identity(name: str) -> str | None:
    """The model's name and eight digits that change when its files do, so that a ledger never mixes two; None: not on this machine."""
    digits = fingerprint(name)
    return None if digits is None else f"{'mini-llava' if name == 'mini' else name} {digits[:8]}"
