"""The local backend on a random LLaVA: batching changes nothing, and what never ends is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_llava import save_tiny

from mllm_fl.annotate.backends.base import Request, png
from mllm_fl.annotate.backends.local import LocalBackend, identity
from mllm_fl.annotate.ledger import Entry
from mllm_fl.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def ask(backend: LocalBackend, requests: list[Request]) -> list[Entry]:
    out: dict[int, Entry] = {}
    backend.answer(requests, lambda got: out.update(got))
    return [out[i] for i in range(len(requests))]


def requests() -> list[Request]:
    draws = torch.Generator().manual_seed(0)
    questions = [("which character is this ?", "is it narrow or wide ?"), ("what is in the picture ?",)]
    return [
        Request(png(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=draws)), questions[i % 2])
        for i in range(5)
    ]


def ending(backend: LocalBackend, strength: float) -> LocalBackend:
    """Push the end token up or down, so that the random model ends at once or never."""
    backend._model.lm_head.bias = torch.nn.Parameter(
        torch.zeros(backend._model.lm_head.out_features), requires_grad=False
    )
    backend._model.lm_head.bias.data[backend.processor.tokenizer.eos_token_id] = strength
    return backend


def test_an_answer_without_an_end_is_a_failure_with_its_tokens_counted(folder: Path) -> None:
    entries = ask(ending(LocalBackend(str(folder), max_tokens=4), -100), requests())
    assert {e.error for e in entries} == {"answer cut off at max_tokens"}
    assert [e.completion_tokens for e in entries] == [8, 4, 8, 4, 8]
    assert all(e.prompt_tokens > 16 and e.texts == () for e in entries)


def test_an_empty_answer_is_a_failure(folder: Path) -> None:
    assert {e.error for e in ask(ending(LocalBackend(str(folder)), 100), requests())} == {"empty answer"}


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    said = []
    for size in (64, 1):
        backend = LocalBackend(str(folder), max_tokens=8, batch_size=size)
        for p in backend._model.parameters():
            p.mul_(8)  # a random model at its initial scale says the same about everything
        backend._model.generation_config.eos_token_id = [37, 101]  # two that it does say
        said.append([(e.texts, e.error, e.completion_tokens) for e in ask(backend, requests())])
    assert said[0] == said[1]
    assert len({repr(s) for s in said[0]}) > 2


def test_a_chat_template_is_used_where_the_model_has_one(folder: Path) -> None:
    backend = LocalBackend(str(folder))
    assert backend.prompt("", "what ?") == "USER: <image>\nwhat ? ASSISTANT:"
    backend.processor.chat_template = "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}"
    assert backend.prompt("be brief", "what ?") == "[system]be brief[user]<image>what ?"


def test_two_models_of_one_name_are_two_in_the_ledger(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    first = identity(str(folder))
    assert first == LocalBackend(str(folder)).model
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert identity(str(folder)) != first
    assert identity("no-such/model") is identity("/nowhere/model") is None
    assert str(identity("mini")).startswith("mini-llava ")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        LocalBackend(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded as a vision-language model"):
        LocalBackend(str(tmp_path))
