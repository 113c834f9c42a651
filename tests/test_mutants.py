"""The mutation check checks: mutants differ in one place, a sound test kills them, and a term without a test survives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutation() -> Any:
    """scripts/mutation.py as a module."""
    spec = importlib.util.spec_from_file_location("mutation", ROOT / "scripts" / "mutation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = module  # a NamedTuple looks its own module up
    spec.loader.exec_module(module)
    return module


SOURCE = '''
def f(a, b, mu=2.0):
    """A docstring is not mutated."""
    if mu < 0:
        raise ValueError("nor is a check of bad input")
    out = {}
    out["x"] = a - mu * b ** 2
    return max(out["x"].sum(), 0) if a else -b

class C:
    def __post_init__(self):
        assert 1 + 1

    def g(self, x):
        return super().g(x) + x
'''


def test_what_is_changed(mutation: Any) -> None:
    found = [m.what for m in mutation.mutants("m", SOURCE)]
    assert found == [
        "statement skipped: out['x'] = a - mu * b ** 2 -> pass",
        "addend dropped: a - mu * b ** 2 -> a",
        "addend dropped: a - mu * b ** 2 -> mu * b ** 2",
        "sign flipped: a - mu * b ** 2 -> a + mu * b ** 2",
        "factor dropped: mu * b ** 2 -> mu",
        "factor dropped: mu * b ** 2 -> b ** 2",
        "exponent dropped: b ** 2 -> b",
        "constant changed: 2 -> 3",
        "branch forced: max(out['x'].sum(), 0) if a else -b -> max(out['x'].sum(), 0)",
        "branch forced: max(out['x'].sum(), 0) if a else -b -> -b",
        "call dropped: out['x'].sum() -> out['x']",
        "constant changed: 0 -> 1",
        "negation dropped: -b -> b",
        "addend dropped: super().g(x) + x -> super().g(x)",
        "addend dropped: super().g(x) + x -> x",
        "sign flipped: super().g(x) + x -> super().g(x) - x",
    ]
    assert len({m.key for m in mutation.mutants("m", SOURCE)}) == len(found)
    assert [m.function for m in mutation.mutants("m", SOURCE, lambda name: name == "C")] == ["C.g"] * 3


def test_a_mutant_takes_the_functions_place_for_everybody(mutation: Any) -> None:
    text = (
        "class B:\n    def g(self, x):\n        return 10 * x\n\n"
        "class C(B):\n    def g(self, x):\n        return super().g(x) + x\n\n"
        "def f(a, *, k=3):\n    return a - k\n"
    )
    module = ModuleType("m")
    exec(text, module.__dict__)
    held = module.f
    by = {m.what: m for m in mutation.mutants("m", text)}
    mutation.put(module, by["sign flipped: a - k -> a + k"])
    assert held(4) == 7
    mutation.put(module, by["addend dropped: super().g(x) + x -> x"])  # super() is gone, and with it the closure
    assert module.C().g(2) == 2
    mutation.put(module, by["addend dropped: super().g(x) + x -> super().g(x)"])
    assert module.C().g(2) == 20


def test_a_mutant_goes_under_a_decorator(mutation: Any) -> None:
    text = (
        "import functools\n\n"
        "def twice(f):\n    @functools.wraps(f)\n    def call(a):\n        return 2 * f(a)\n    return call\n\n"
        "@twice\ndef f(a):\n    return a - 3\n"
    )
    module = ModuleType("m")
    exec(text, module.__dict__)
    held = module.f
    by = {m.what: m for m in mutation.mutants("m", text, lambda name: name == "f")}
    mutation.put(module, by["sign flipped: a - 3 -> a + 3"])
    assert held(4) == 14


def test_on_one_small_method(tmp_path: Path) -> None:
    """tau-norm's own hook: every mutant is killed, rows and page are written, and a second run has nothing to do."""
    command = [
        sys.executable, "scripts/mutants.py", "--method", "taunorm", "--function", "TauNorm.deploy",
        "--results", str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.md"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "7 mutants, 0 survived\n"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {r["status"] for r in rows} == {"killed"}
    assert all(r["by"].startswith("tests/") for r in rows)
    assert "| `taunorm` | 7 | 7 | 0 | 0 | 0 | 0 |" in (tmp_path / "page.md").read_text()
    again = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (again.stdout, again.stderr) == ("", "0 mutants\n")


@pytest.fixture(scope="module")
def mutants(mutation: Any) -> Any:
    """scripts/mutants.py as a module."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current_and_nothing_survives(mutants: Any) -> None:
    """docs/mutants.md is what results/mutants.jsonl says; ``make mutants`` writes both."""
    rows, known = list(mutants.rows_of(mutants.RESULTS).values()), mutants.equivalents()
    assert mutants.PAGE.read_text(encoding="utf-8") == mutants.page(rows, known)
    assert [(r["function"], r["mutant"]) for r in rows if mutants.verdict(r, known) == "survived"] == []


def test_every_method_and_its_pure_functions_are_mutated(mutants: Any) -> None:
    """Each method's own file has rows, and so have the equations that its file imports, under it or under a method before it."""
    rows = list(mutants.rows_of(mutants.RESULTS).values())
    tried = {(r["module"], r["function"].partition(".")[0]) for r in rows}
    for name, (module, _) in mutants.methods().items():
        assert any(r["unit"] == name and r["module"] == module for r in rows), name
        straight = {(there, f) for there, f in mutants.used(module) if there != "descent"}
        assert not {
            (there, f)
            for there, f in straight - tried
            if any(mutants.mutants(there, mutants.path_of(there).read_text(), f.__eq__))
        }, name


def test_a_survivor_makes_the_check_fail(mutants: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A recorded survivor without a reason: exit status 1. With a reason it is equivalent, and a reason for no mutant fails too."""
    key = next(
        m
        for u in mutants.units()
        if u.name == "taunorm"
        for m in mutants.mutants("algorithms.taunorm", mutants.path_of("algorithms.taunorm").read_text())
    )
    row = {
        "unit": "taunorm",
        "module": key.module,
        "function": key.function,
        "mutant": key.what,
        "key": key.key,
        "status": "survived",
        "by": "",
    }
    assert (
        mutants.verdict(row, {}) == "survived" and mutants.wanted(row, {}, False) and not mutants.wanted(row, {}, True)
    )
    reason = {(f"{key.module}.{key.function}", key.what): "because"}
    assert mutants.verdict(row, reason) == "equivalent" and not mutants.wanted(row, reason, False)
    assert "## Survived: a test is missing" in mutants.page([row], {})
    assert "| because |" in mutants.page([row], reason)
    (tmp_path / "rows.jsonl").write_text("")
    monkeypatch.setattr(
        mutants,
        "in_parallel",
        lambda todo, jobs: iter(
            [row | {"key": m.key, "function": m.function, "mutant": m.what} for _, ms in todo.values() for m in ms]
        ),
    )
    monkeypatch.setattr(mutants, "preload", lambda: None)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "mutants.py",
            "--method",
            "taunorm",
            "--function",
            "TauNorm.deploy",
            "--results",
            str(tmp_path / "rows.jsonl"),
            "--page",
            str(tmp_path / "page.md"),
        ],
    )
    assert mutants.main() == 1
