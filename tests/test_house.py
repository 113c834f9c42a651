"""The house stands: imports run downward, each heavy library lives in its own rooms, methods are pure, nothing is pickled.

The rules read the source as syntax trees, so they cover code that no test runs. Each rule is also shown a planted
violation, so that a rule that has gone blind is noticed.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mllm_fl

SRC = Path(__file__).resolve().parents[1] / "src" / "mllm_fl"

FLOORS: dict[str, int] = {
    **dict.fromkeys(("", "atomic", "errors", "seeds", "trees", "events", "toml"), 0),
    **dict.fromkeys(("losses", "statistics", "descent", "matching", "metrics", "data", "models"), 1),
    **dict.fromkeys(("algorithms", "annotate"), 2),
    **dict.fromkeys(("engines",), 3),
    **dict.fromkeys(("stages", "config", "runs", "results", "conformance"), 4),
    **dict.fromkeys(("report", "jobs", "console", "overrides", "trackers", "deployment"), 5),
    **dict.fromkeys(("cli", "commands"), 6),
}
EXCEPTIONS = {("runs", "environment", "transformers")}  # (module, function, library): it reads a version
ROOMS: dict[str, tuple[str, ...]] = {  # library -> the only modules (or packages) that may import it
    "transformers": ("models.teacher", "annotate.backends"),
    "matplotlib": ("report",),
}
ONE_FILE = ("flwr", "tyro", "openai")
PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
METHODS_MAY = (  # of this package; base may import more
    *("algorithms.base", "algorithms.counts", "algorithms.distilling"),  # the contract, and what two methods share
    *("losses", "statistics", "descent", "matching", "metrics", "trees", "errors"),  # pure functions
    *("data.images", "data.strong", "data.dsa"),  # the form of images, and augmentation from given numbers
)
DISK = ("io", "os", "pathlib", "json", "sqlite3", "socket", "subprocess", "shutil", "tempfile", "urllib", "pyarrow")
DISK_CALLS = (
    "open",
    "read_text",
    "write_text",
    "read_bytes",
    "write_bytes",
    "mkdir",
    "unlink",
    "print",
    "save",
    "load",
)
DRAWS = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
SEEDING = ("seed", "manual_seed", "default_rng", "RandomState", "fork_rng", "set_rng_state", "random", "shuffle")
DEVICES = ("cpu", "cuda", "mps", "xpu")
LONGEST = 500


def module_of(package: Path, file: Path) -> str:
    """``algorithms.fedprox`` of ``package/algorithms/fedprox.py``; a package's own name of its ``__init__.py``."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(imported module, line, innermost function) of each import, also those by a literal ``import_module("name")``."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((a.name, child.lineno, function) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                yield from ((f"{base}.{a.name}", child.lineno, function) for a in child.names)
            elif isinstance(child, ast.Call) and name_of(child.func).endswith(("import_module", "__import__")):
                first = child.args[0] if child.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value, child.lineno, function
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from walk(child, inside)

    yield from walk(tree, "")


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a dotted expression; what cannot be named becomes ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def under(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def violations(package: Path) -> list[str]:
    """Every breach of the rules in a package laid out like ``mllm_fl``, as ``module:line: what``."""
    found: list[str] = []
    owners: dict[str, set[str]] = {name: set() for name in ONE_FILE}
    for file in sorted(package.rglob("*.py")):
        module, text = module_of(package, file), file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if (length := len(text.splitlines())) > LONGEST:
            found.append(f"{module}:1: {length} lines, more than {LONGEST}")
        if module.partition(".")[0] not in FLOORS:
            found.append(f"{module}:1: stands on no floor")
            continue
        for name, line, function in imports(tree):
            library = name.partition(".")[0]
            found += [f"{module}:{line}: {what}" for what in _import_breaches(module, name, function)]
            if library in owners:
                owners[library].add(module)
        found += [f"{module}:{line}: {what}" for line, what in _pickles_and_eval(tree)]
        if under(module, "algorithms"):
            found += [f"{module}:{line}: {what}" for line, what in _impure(tree, module)]
    found += [
        f"{'+'.join(sorted(who))}:1: {name} is imported in {len(who)} files"
        for name, who in owners.items()
        if len(who) > 1
    ]
    return found


def _import_breaches(module: str, name: str, function: str) -> Iterator[str]:
    library, _, inside = name.partition(".")
    if library == "mllm_fl":
        target = inside.partition(".")[0]
        target = target if target in FLOORS else ""  # a name of the package itself, such as __version__
        if FLOORS[target] > FLOORS[module.partition(".")[0]] and module:
            yield f"imports upward: {name}"
        own = module in ("algorithms", "algorithms.base")
        if under(module, "algorithms") and not own and not any(under(inside, m) for m in METHODS_MAY):
            yield f"a method may not import {name}"
    at_home = any(under(module, room) for room in ROOMS.get(library, ()))
    if library in ROOMS and not at_home and (module, function, library) not in EXCEPTIONS:
        yield f"{library} belongs under {' and '.join(ROOMS[library])}"
    if library in PICKLES:
        yield f"imports {library}"
    if under(module, "algorithms"):
        if library in (*ONE_FILE, "transformers"):
            yield f"a method may not import {library}"
        if library == "random" or (library in DISK and module != "algorithms"):  # the registry reads the import path
            yield f"a method may not import {library}"


def _pickles_and_eval(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            if called in ("torch.load", "torch.save", "eval", "exec"):
                yield node.lineno, f"calls {called}"
            for k in node.keywords:
                if k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False):
                    yield node.lineno, "allows pickles"


def _impure(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Disk, seeds, draws without a named stream, and devices, in a file of ``algorithms``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            last = called.rpartition(".")[2]
            if last in DISK_CALLS:
                yield node.lineno, f"a method does no input or output: {called}"
            elif last in SEEDING:
                yield node.lineno, f"a method does not seed: {called}"
            elif last in DRAWS and not any(k.arg == "generator" for k in node.keywords):
                yield node.lineno, f"draws without a named stream: {called}"
            elif last in DEVICES or called == "torch.device":
                yield node.lineno, f"a method chooses no device: {called}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0] in DEVICES:
            yield node.lineno, f"a method chooses no device: {node.value!r}"
        elif isinstance(node, ast.Attribute) and name_of(node) in ("torch.cuda", "torch.mps"):
            yield node.lineno, f"a method chooses no device: {name_of(node)}"


def test_the_house_stands() -> None:
    assert violations(SRC) == []


PLANTED = [  # file, line of code, what the checker must say
    ("data/x.py", "import mllm_fl.stages.federate", "data.x:1: imports upward: mllm_fl.stages.federate"),
    ("data/x.py", "from mllm_fl import config", "data.x:1: imports upward: mllm_fl.config"),
    ("engines/x.py", "def f():\n    from mllm_fl.runs import RunFolder", "engines.x:2: imports upward: mllm_fl.runs.RunFolder"),
    ("errors.py", "from mllm_fl.data.images import ImageSet", "errors:1: imports upward: mllm_fl.data.images.ImageSet"),
    ("algorithms/x.py", "from mllm_fl.algorithms.fedprox import FedProx", "algorithms.x:1: a method may not import mllm_fl.algorithms.fedprox"),
    ("algorithms/x.py", "from mllm_fl.seeds import stream", "algorithms.x:1: a method may not import mllm_fl.seeds"),
    ("algorithms/x.py", "from mllm_fl.engines import serial", "algorithms.x:1: imports upward: mllm_fl.engines"),
    ("algorithms/x.py", "import flwr", "algorithms.x:1: a method may not import flwr"),
    ("algorithms/x.py", "import random", "algorithms.x:1: a method may not import random"),
    ("algorithms/x.py", "from pathlib import Path", "algorithms.x:1: a method may not import pathlib"),
    ("algorithms/x.py", "open('x')", "algorithms.x:1: a method does no input or output: open"),
    ("algorithms/x.py", "p.read_text()", "algorithms.x:1: a method does no input or output: p.read_text"),
    ("algorithms/x.py", "torch.manual_seed(0)", "algorithms.x:1: a method does not seed: torch.manual_seed"),
    ("algorithms/x.py", "np.random.default_rng()", "algorithms.x:1: a method does not seed: np.random.default_rng"),
    ("algorithms/x.py", "torch.randn(3)", "algorithms.x:1: draws without a named stream: torch.randn"),
    ("algorithms/x.py", "x.cuda()", "algorithms.x:1: a method chooses no device: x.cuda"),
    ("algorithms/x.py", "x.to('cuda:0')", "algorithms.x:1: a method chooses no device: 'cuda:0'"),
    ("stages/x.py", "import transformers", "stages.x:1: transformers belongs under models.teacher and annotate.backends"),
    ("runs.py", "import transformers", "runs:1: transformers belongs under"),
    ("data/x.py", "import matplotlib.pyplot as plt", "data.x:1: matplotlib belongs under report"),
    ("data/x.py", "import importlib\nimportlib.import_module('matplotlib')", "data.x:2: matplotlib belongs under report"),
    ("data/x.py", "import pickle", "data.x:1: imports pickle"),
    ("data/x.py", "torch.load('x')", "data.x:1: calls torch.load"),
    ("data/x.py", "np.load('x', allow_pickle=True)", "data.x:1: allows pickles"),
    ("data/x.py", "eval('1')", "data.x:1: calls eval"),
    ("attic/x.py", "", "attic.x:1: stands on no floor"),
    ("data/x.py", "x = 1\n" * 501, "data.x:1: 501 lines, more than 500"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "code", "says"), PLANTED, ids=[f"{f}: {c[:40]}" for f, c, _ in PLANTED])
def test_each_rule_sees_a_planted_breach(tmp_path: Path, file: str, code: str, says: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert any(v.startswith(says) for v in violations(tmp_path)), violations(tmp_path)


def test_a_library_of_one_file_in_two_files_is_seen(tmp_path: Path) -> None:
    for name in ("cli", "overrides"):
        (tmp_path / f"{name}.py").write_text("import tyro")
    assert violations(tmp_path) == ["cli+overrides:1: tyro is imported in 2 files"]


def test_what_is_allowed_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "good.py").write_text(
        "import torch\nfrom mllm_fl.algorithms.base import FedAvg\nfrom mllm_fl.losses import kl\n"
        "def f(g, x):\n    return torch.randn(3, generator=g, device=x.device)\n"
    )
    (tmp_path / "runs.py").write_text("from mllm_fl import __version__\ndef environment():\n    import transformers\n")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "good.py").write_text("from mllm_fl.runs import RunFolder\nnet.eval()\n")
    assert violations(tmp_path) == []


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy_and_touches_nothing() -> None:
    code = """
import json, sys
seen = []
def hook(event, args):
    if event.startswith("socket.") or event == "subprocess.Popen":
        seen.append(event)
    elif event == "open" and not str(args[0]).endswith((".py", ".pyc")):
        seen.append(str(args[0]))
sys.addaudithook(hook)
import mllm_fl
heavy = [m for m in ("torch", "numpy", "pyarrow", "PIL", "transformers", "safetensors") if m in sys.modules]
print(json.dumps([seen, heavy]))
"""
    assert json.loads(_python(code)) == [[], []]


CORE = ("data", "models", "algorithms", "engines", "stages", "runs", "config")
ABSENT = (
    "tyro", "flwr", "openai", "matplotlib", "sklearn", "datasets", "pydantic", "rich", "pandas", "imagehash", "timm", "torchvision",
    "open_clip",
)  # fmt: skip


def test_the_core_imports_without_the_optional_libraries() -> None:
    """A machine that trains has torch, numpy, pyarrow, Pillow, safetensors and transformers, and need have no more."""
    core = [m for f in sorted(SRC.rglob("*.py")) if (m := module_of(SRC, f)).partition(".")[0] in CORE]
    assert len(core) > 20
    code = f"""
import importlib, importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)
sys.meta_path = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
for name in {core!r}:
    importlib.import_module("mllm_fl." + name)
print([m for m in {ABSENT!r} if m in sys.modules])
"""
    assert _python(code).strip() == "[]"


def test_every_public_name_resolves() -> None:
    assert sorted(mllm_fl.__all__) == mllm_fl.__all__ == dir(mllm_fl) or set(mllm_fl.__all__) == set(dir(mllm_fl))
    for name in mllm_fl.__all__:
        assert getattr(mllm_fl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mllm_fl.nothing
