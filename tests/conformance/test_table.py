"""The table of methods: 80 columns, from the classes and the first lines of their files; docs/methods.md is what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mllm_fl.algorithms import METHODS
from mllm_fl.algorithms.base import FedAvg
from mllm_fl.cli import main
from mllm_fl.conformance.table import entries, heading, markdown, neutral_words, render, size

ROOT = Path(__file__).parents[2]


def test_a_line_a_method_within_80_columns() -> None:
    lines = render(entries()).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in METHODS] == list(METHODS)


def test_what_stands_in_it() -> None:
    by = {e.name: e for e in entries(["fedavg", "fedprox", "scaffold", "creff", "taunorm"])}
    assert by["fedprox"].title == "FedProx"
    assert (by["fedprox"].year, by["fedprox"].arxiv) == (2020, "1812.06127")
    assert by["fedprox"].paper == "Federated Optimization in Heterogeneous Networks"
    assert by["fedprox"].hooks == ("objective",)
    assert by["scaffold"].upload_bytes == (4 * 1_227_594, 4 * 1_250_724)  # the parameters of PROTOCOL section 2
    assert by["creff"].upload_bytes == (10 * 10 * 257 * 4, 100 * 100 * 257 * 4)  # C (d + 1) floats a class
    assert by["fedavg"].hooks == ()
    assert by["taunorm"].post_hoc and not by["fedprox"].post_hoc
    assert neutral_words(by["fedprox"]) == "mu=0"
    assert neutral_words(by["taunorm"]) == "tau=0, bias=True"


def test_every_file_opens_with_its_paper() -> None:
    for e in entries():
        assert e.title and e.authors and e.paper, e.name
        assert 2016 <= e.year <= 2026
        assert len(e.arxiv) == 10
    assert heading(FedAvg)[0] == "FedAvg"


def test_sizes_have_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 102_800, 4_910_376, 2_634_240_000, 10**13)] == [
        "0", "999", "1k", "103k", "4.91M", "2.63G", "10T",
    ]  # fmt: skip


def test_the_page_is_current() -> None:
    """After a change to a method: ``mllm-fl methods --markdown > docs/methods.md``."""
    measured = ROOT / "results" / "method_costs.jsonl"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == markdown(measured) + "\n"


def test_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["methods"]) == 0
    assert capsys.readouterr().out.startswith("method          paper")
    assert main(["methods", "--json"]) == 0
    assert [e["name"] for e in json.loads(capsys.readouterr().out)] == list(METHODS)
    (tmp_path / "mine_broken.py").write_text(
        '"""Mine."""\nfrom dataclasses import dataclass\nfrom mllm_fl.algorithms.base import Algorithm\n\n'
        "@dataclass(frozen=True)\nclass Mine(Algorithm):\n"
        "    def finish(self, task, local, msg, mine):\n"
        "        msg.w['classifier.bias'] += 1\n        return super().finish(task, local, msg, mine)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["check-method", "mine_broken:Mine", "--only", "arguments", "--only", "shapes"]) == 1
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("fails   arguments         finish changes its argument 'msg': an operation in place")
    assert second.startswith(
        "fails   shapes            UserError: federate.algorithm: Mine: a client's hook changed the broadcast"
    )
    assert err.startswith("mine_broken:Mine: 2 of 2 checks fail, 0 waived, ")
    assert main(["check-method", "fedprox", "--only", "smooth", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sound"], [c["status"] for c in found["checks"]]) == (True, ["ok"])
    assert main(["check-method", "fedprx"]) == 2
    assert "check-method: unknown method 'fedprx'; did you mean 'fedprox'?" in capsys.readouterr().err
