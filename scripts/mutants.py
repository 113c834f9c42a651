"""Mutation check: delete or flip each method's own terms, one at a time; its tests must notice every one.

For each method, the functions of its file and the pure functions that it uses (``SHARED``) are read as syntax trees. A mutant differs in one place: an addend is
dropped, a sign flipped, a factor or a zero-argument call left out, arguments swapped, a comparison or constant changed, a branch forced, a statement
skipped (``scripts/mutation.py``). A process collects a method's tests once (its oracle, its own tests, its row of the conformance suite) and forks for each
mutant, which takes the function's place in memory: no file of the package is touched. The first failing test ends a mutant. A mutant that fails nothing has survived, unless ``scripts/mutants_equivalent.toml`` says why no test can see it.

    python scripts/mutants.py [--method fedprox ...] [--jobs 2] [--fresh] [--list]

Resumable: ``results/mutants.jsonl`` holds a line for each mutant, and only new, changed or surviving ones are run. Writes docs/mutants.md.
Not mutated: checks of bad input (``__post_init__``, ``raise``), docstrings, declarations, and augmentation (``data/dsa.py``, ``data/strong.py``).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import resource
import select
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mutation import Mutant, mutants, put

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "mllm_fl"
RESULTS = ROOT / "results" / "mutants.jsonl"
PAGE = ROOT / "docs" / "mutants.md"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.toml")
SHARED = ("losses", "statistics", "descent", "matching", "trees", "algorithms.counts", "algorithms.distilling")
CONTRACT = {
    ("losses", "cross_entropy"),
    *(("trees", name) for name in ("weighted_mean", "why_of_another_form", "_why_unlike")),
    *(("algorithms.refusal", name) for name in ("why_refused", "why_answer_refused", "_beside")),
}
"""What FedAvg's unit holds beside the class itself."""
OF_TREES = {"weighted_mean"}  # the rest of trees.py is arithmetic with tests of its own
CPU_SECONDS = 120  # a mutant that loops is killed after this much processor time


# ---------------------------------------------------------------- what belongs to a method


def path_of(module: str) -> Path:
    """The file of ``losses`` or ``algorithms.fedprox``."""
    return SRC / (module.replace(".", "/") + ".py")


def methods() -> dict[str, tuple[str, str]]:
    """name -> (module, class), read from the registry's text."""
    tree = ast.parse((SRC / "algorithms" / "__init__.py").read_text(encoding="utf-8"))
    table = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "METHODS")
    found = ast.literal_eval(table.value)
    return {k: tuple(v.removeprefix("mllm_fl.").split(":")) for k, v in found.items()}  # type: ignore[misc]


def used(module: str, wanted: set[str] | None = None) -> set[tuple[str, str]]:
    """(module, name) of the shared functions that a file uses, those that they use included."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    within = tree.body if wanted is None else [n for n in tree.body if getattr(n, "name", "") in wanted]
    names = {n.id for top in within for n in ast.walk(top) if isinstance(n, ast.Name)}
    out: set[tuple[str, str]] = set()
    if wanted is not None:  # a shared module's own helpers
        own = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)} & names - wanted
        out |= {(module, n) for n in own}
        if own:
            out |= used(module, wanted | own)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllm_fl."):
            there = (node.module or "").removeprefix("mllm_fl.")
            if there in SHARED:
                taken = {a.name for a in node.names} & names
                taken = taken & OF_TREES if there == "trees" else taken
                out |= {(there, n) for n in taken}
                for n in taken:
                    out |= used(there, {n})
    return out


class Unit(NamedTuple):
    """What is mutated together, and the tests that must notice; ``parts`` are (module, names or None for all)."""

    name: str
    parts: tuple[tuple[str, frozenset[str] | None], ...]
    tests: tuple[str, ...]


def units() -> list[Unit]:
    """One unit a method. A shared function belongs to the first method that uses it, and is held by the tests of all."""
    table = methods()
    uses = {m: used(module) if m != "fedavg" else CONTRACT for m, (module, _) in table.items()}
    taken: set[tuple[str, str]] = set()
    out = []
    for m, (module, cls) in table.items():
        own: tuple[str, frozenset[str] | None] = (module, frozenset({"Algorithm"}) if cls == "FedAvg" else None)
        fresh = sorted(uses[m] - taken)
        taken |= set(fresh)
        by_module: dict[str, set[str]] = {}
        for there, name in fresh:
            by_module.setdefault(there, set()).add(name)
        kin = [m] + [k for k in table if k != m and uses[k] & set(fresh)]
        tests = [*tests_of(m, uses[m]), *(t for k in kin[1:] for t in tests_of(k, uses[k]))]
        tests.sort(key=lambda t: "::" in t)  # the suite's rows are slow: last
        parts = (own, *((there, frozenset(names)) for there, names in sorted(by_module.items())))
        out.append(Unit(m, parts, tuple(dict.fromkeys(tests))))
    return out


def tests_of(method: str, uses: set[tuple[str, str]]) -> Iterator[str]:
    """The tests of one method, quick ones first; the conformance row by its ids."""
    for folder in ("oracles", "algorithms"):
        yield from (str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / folder).glob(f"test_{method}*.py")))
    if method == "fedavg":
        yield "tests/algorithms/test_refusal.py"
    if any(module == "algorithms.counts" for module, _ in uses):
        yield "tests/oracles/test_priors.py"
    for module in sorted({module for module, _ in uses if "." not in module}):
        yield from (str(p.relative_to(ROOT)) for p in [ROOT / "tests" / f"test_{module}.py"] if p.exists())
    yield f"tests/conformance/test_methods.py::{method}"


# ---------------------------------------------------------------- running


def serve(unit: Unit, todo: list[Mutant], out: int) -> None:
    """Collect the unit's tests once, then fork for each mutant; a JSON line each goes to the pipe. Ends the process."""
    import pytest

    status = 1
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.dont_write_bytecode = True
        rows = {t.partition("::")[2] for t in unit.tests if "::" in t}

        class Loop:
            """In place of pytest's own loop over the tests: that loop once for each mutant; a test that kills is tried without one too."""

            def pytest_collection_modifyitems(self, items: list[Any]) -> None:
                items[:] = [
                    i for i in items
                    if "test_methods.py" not in i.nodeid or (i.name.startswith("test_conforms") and i.name[14:].split("-")[0] in rows)
                ]  # fmt: skip

            def pytest_runtestloop(self, session: Any) -> bool:
                unsound, sound = "collection" if session.testsfailed else "", {""}
                for m in todo:
                    start = time.perf_counter()
                    first = "" if unsound else tried(session.items, m)
                    if first not in sound:  # a test that fails without the mutant too kills nothing
                        alone = [i for i in session.items if i.nodeid == first]
                        unsound = tried(alone, None) if alone else ""
                        sound |= {first} if alone else set()
                    if unsound:
                        os.write(out, json.dumps({"unit": unit.name, "unsound": unsound}).encode() + b"\n")
                        return True
                    row = {
                        "unit": unit.name, "module": m.module, "function": m.function, "mutant": m.what, "key": m.key,
                        "status": "killed" if first else "survived", "by": first, "seconds": round(time.perf_counter() - start, 1),
                    }  # fmt: skip
                    os.write(out, json.dumps(row).encode() + b"\n")
                return True

        files = list(dict.fromkeys(t.partition("::")[0] for t in unit.tests))
        status = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *files], [Loop()]))
    finally:
        os._exit(status)


def tried(items: list[Any], m: Mutant | None) -> str:
    """Run the tests in a child process, with the mutant in place, until one fails: its id, or nothing if all pass."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            os.close(read)
            if m is not None:
                put(importlib.import_module(f"mllm_fl.{m.module}"), m)
            failed: list[str] = []

            class Ear:
                def pytest_runtest_logreport(self, report: Any) -> None:
                    if report.failed:
                        failed.append(report.nodeid)

            if items:
                items[0].config.pluginmanager.register(Ear())
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if failed:
                    break
            os.write(write, (failed[0] if failed else "passed").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return "" if said == "passed" else said or "the process died"


def in_parallel(todo: dict[str, tuple[Unit, list[Mutant]]], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of all units as they come, ``jobs`` units at a time."""
    waiting = list(todo.values())
    open_pipes: dict[int, tuple[int, bytes]] = {}
    while waiting or open_pipes:
        while waiting and len(open_pipes) < jobs:
            unit, these = waiting.pop(0)
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                serve(unit, these, write)
            os.close(write)
            open_pipes[read] = (pid, b"")
        for read in select.select(list(open_pipes), [], [])[0]:
            pid, before = open_pipes[read]
            data = os.read(read, 65536)
            *lines, rest = (before + data).split(b"\n")
            yield from map(json.loads, lines)
            open_pipes[read] = (pid, rest)
            if not data:
                os.close(read)
                os.waitpid(pid, 0)
                del open_pipes[read]


# ---------------------------------------------------------------- results and page


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The recorded rows by key."""
    if not path.exists():
        return {}
    return {r["key"]: r for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def equivalents() -> dict[tuple[str, str], str]:
    """(module.function, mutant) -> the reason why no test can see it."""
    if not EQUIVALENT.exists():
        return {}
    listed = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    return {(e["function"], e["mutant"]): e["reason"] for e in listed}


def verdict(row: dict[str, Any], known: dict[tuple[str, str], str]) -> str:
    """killed, equivalent or survived."""
    if row["status"] == "survived" and (f"{row['module']}.{row['function']}", row["mutant"]) in known:
        return "equivalent"
    return str(row["status"])


def wanted(row: dict[str, Any] | None, known: dict[tuple[str, str], str], untried: bool) -> bool:
    """Whether a mutant with this row is to be run: not yet, or it survived and no reason is given."""
    return row is None or (not untried and verdict(row, known) == "survived")


def page(rows: list[dict[str, Any]], known: dict[tuple[str, str], str]) -> str:
    """docs/mutants.md."""
    lines = [
        "# Mutants",
        "",
        "<!-- written by `make mutants`; do not edit -->",
        "",
        "Each method's own terms, and the pure functions that it uses, deleted or flipped one at a time (`python scripts/mutants.py`, which says how): an"
        " addend dropped, a sign flipped, a factor left out, arguments swapped, a comparison or a constant changed, a branch forced, a statement skipped. The"
        " method's oracle (`tests/oracles`), its own tests (`tests/algorithms`, and those of the shared functions) and its row of the conformance suite run on each"
        " mutant until one fails. A shared function stands with the first method that uses it.",
        "",
        "| method | mutants | killed by its oracle | by its own tests | by the suite | equivalent | survived |",
        "|---|---|---|---|---|---|---|",
    ]
    total = [0] * 6
    for unit in dict.fromkeys(r["unit"] for r in rows):
        mine = [r for r in rows if r["unit"] == unit]
        dead = [r["by"] for r in mine if verdict(r, known) == "killed"]
        oracle = sum(by.startswith("tests/oracles") for by in dead)
        suite = sum(by.startswith("tests/conformance") for by in dead)
        counts = [len(mine), oracle, len(dead) - oracle - suite, suite]
        counts += [sum(verdict(r, known) == v for r in mine) for v in ("equivalent", "survived")]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(f"| `{unit}` | " + " | ".join(map(str, counts)) + " |")
    lines += [
        "| all | " + " | ".join(map(str, total)) + " |",
        "",
        "The test that failed first is counted; others may see a mutant too.",
    ]
    same = [r for r in rows if verdict(r, known) == "equivalent"]
    if same:
        lines += ["", "## Equivalent: no test can see them", "", "| function | mutant | why |", "|---|---|---|"]
        for r in same:
            where = f"{r['module']}.{r['function']}"
            lines.append(f"| `{where}` | {code(r['mutant'])} | {known[where, r['mutant']]} |")
    alive = [r for r in rows if verdict(r, known) == "survived"]
    if alive:
        lines += ["", "## Survived: a test is missing", "", "| function | mutant |", "|---|---|"]
        lines += [f"| `{r['module']}.{r['function']}` | {code(r['mutant'])} |" for r in alive]
    return "\n".join(lines) + "\n"


def code(what: str) -> str:
    """A mutant's words for a table cell."""
    kind, _, change = what.partition(": ")
    return f"{kind}: `` {change.replace('|', chr(92) + '|')} ``"


def preload() -> None:
    """Import what every test imports and no mutant changes, once; children inherit it."""
    import hypothesis
    import numpy
    import pytest
    import safetensors.torch
    import torch

    assert all((hypothesis, numpy, pytest, safetensors.torch))
    torch.set_num_threads(1)
    torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=0.1
    ).step()  # imports torch._dynamo, once instead of per mutant


def main() -> int:
    p = argparse.ArgumentParser(description="Delete or flip each method's own terms; its tests must notice.")
    p.add_argument("--method", action="append", help="only this method (may be repeated)")
    p.add_argument(
        "--function", action="append", help="only functions of this name, e.g. TauNorm.deploy (may be repeated)"
    )
    p.add_argument("--jobs", type=int, default=1, help="processes, one core each (default 1)")
    p.add_argument("--fresh", action="store_true", help="run killed mutants again too")
    p.add_argument("--untried", action="store_true", help="only mutants without a row; survivors are left as they are")
    p.add_argument(
        "--quick", action="store_true", help="without the suite's rows; run again without it for what survives"
    )
    p.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    p.add_argument("--results", type=Path, default=RESULTS, help="where rows are kept (default results/mutants.jsonl)")
    p.add_argument(
        "--page", type=Path, help="where the page goes (default docs/mutants.md, when all methods are recorded)"
    )
    args = p.parse_args()
    every, known, recorded = units(), equivalents(), rows_of(args.results)
    if args.quick:
        every = [u._replace(tests=tuple(t for t in u.tests if "::" not in t)) for u in every]
    if unknown := set(args.method or ()) - {u.name for u in every}:
        p.error(f"no method {sorted(unknown)[0]!r}")
    alive: dict[str, tuple[Unit, Mutant]] = {}
    for unit in every:
        for module, names in unit.parts:
            text = path_of(module).read_text(encoding="utf-8")
            for m in mutants(module, text, lambda n, names=names: names is None or n in names):
                alive[m.key] = (unit, m)
    todo = [
        (u, m) for u, m in alive.values()
        if (not args.method or u.name in args.method) and (not args.function or m.function in args.function)
        and (args.fresh or wanted(recorded.get(m.key), known, args.untried))
    ]  # fmt: skip
    if args.list:
        for u, m in todo:
            print(f"{u.name:16} {m.module}.{m.function}: {m.what}")
        print(f"{len(todo)} mutants", file=sys.stderr)
        return 0
    preload()
    groups: dict[str, tuple[Unit, list[Mutant]]] = {}
    for u, m in todo:
        groups.setdefault(u.name, (u, []))[1].append(m)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    unsound = 0
    for done, row in enumerate(in_parallel(groups, args.jobs), 1):
        if "unsound" in row:
            print(f"{row['unit']}: its tests fail without any mutant: {row['unsound']}", file=sys.stderr)
            unsound += 1
            continue
        recorded[row["key"]] = row
        words = verdict(row, known)
        if words != "killed":
            print(f"{words}: {row['module']}.{row['function']}: {row['mutant']}", flush=True)
        elif done % 20 == 0:
            print(f"{done} of {len(todo)}", file=sys.stderr, flush=True)
        keep(args.results, recorded, alive)
    keep(args.results, recorded, alive)
    rows = [recorded[k] for k in alive if k in recorded]
    chosen = [r for r in rows if not args.method or r["unit"] in args.method]
    if args.page or len(rows) == len(alive):
        (args.page or PAGE).write_text(page(rows, known), encoding="utf-8")
    survived = [r for r in chosen if verdict(r, known) == "survived"]
    stale = sorted(set(known) - {(f"{m.module}.{m.function}", m.what) for _, m in alive.values()})
    for function, what in stale:
        print(f"{EQUIVALENT.name}: no such mutant: {function}: {what}", file=sys.stderr)
    print(f"{len(chosen)} mutants, {len(survived)} survived")
    return 2 if unsound else 1 if survived or stale else 0


def keep(path: Path, recorded: dict[str, dict[str, Any]], alive: dict[str, Any]) -> None:
    """Write the rows of mutants that still exist, whole or not at all."""
    order = [k for k in alive if k in recorded]
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(json.dumps(recorded[k]) + "\n" for k in order), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
