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
