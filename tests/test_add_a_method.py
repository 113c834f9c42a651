"""docs/add-a-method.md says what is so: its method runs, equals FedAvg at its neutral value, and does what its equation says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_fl.algorithms.base import FedAvg, Update
from mllm_fl.config import load
from mllm_fl.conformance.row import row_of
from mllm_fl.conformance.suite import CHECKS, run
from mllm_fl.errors import UserError
from mllm_fl.trees import digest
from tests import toy
from tests.conformance.test_methods import play, some_clients

DOCUMENT = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The only fenced block of one language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(text)


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The document's class, imported from a file beside the configuration."""
    (tmp_path / "my_module.py").write_text(block("python"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    yield importlib.import_module("my_module").FedAvgM
    sys.modules.pop("my_module", None)


def test_the_toml_names_it(method: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(block("toml"), encoding="utf-8")
    assert load(tmp_path / "mine.toml").runs[0].federate.method == method(momentum=0.5)
    with pytest.raises(UserError, match=r"federate.method.momentum: 2 is not in \[0, 1\)"):
        method(momentum=2)


def test_its_neutral_value_is_fedavg_and_its_default_is_not(method: Any) -> None:
    plain = digest(play(FedAvg(), some_clients())[1])
    assert digest(play(method(**method.neutral), some_clients())[1]) == plain
    assert digest(play(method(), some_clients())[1]) != plain


def test_momentum_by_hand(method: Any) -> None:
    """Clients send w + 1 each time. v: 1, then 0.5 + 1 = 1.5; so w: 0, 1, 2.5."""
    task, w = toy.task(toy.federation())
    state = method(momentum=0.5).init(task, w | {"classifier.bias": torch.zeros(3)})
    for expected in (1.0, 2.5):
        sent = state.w | {"classifier.bias": state.w["classifier.bias"] + 1}
        state = method(momentum=0.5).server(task, state, [Update(0, sent, 4.0, {}, {})])
        assert state.w["classifier.bias"].tolist() == [expected] * 3
    assert state.w["backbone.bn.num_batches_tracked"].dtype == torch.int64


def test_it_conforms_and_the_table_names_every_check(method: Any) -> None:
    """The command of the document, as a library call; each check stands in the document's table once."""
    assert [v for v in run(row_of("my_module:FedAvgM")) if v.status != "ok"] == []
    table = [line.split("|")[1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([\w-]+)`", " ".join(table))) == sorted(CHECKS)
