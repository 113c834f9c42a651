"""Habits of the whole source, read as syntax trees beside the floors of test_house.py: who may import a package, no loops, no prints, no global draws."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mllm_fl

SOURCES = Path(mllm_fl.__file__).parent
CORE = {"PIL", "filelock", "numpy", "pyarrow", "safetensors", "torch"}
"""Present wherever the package runs, so importable from every file (filelock comes with torch)."""
OWNERS = {
    "datasets": ("data/hub.py",),
    "cryptography": ("deployment/certificates.py", "deployment/doctor.py"),
    "imagehash": ("annotate/quality/near.py",),
    "py3langid": ("annotate/quality/texts.py",),
    "flwr": ("engines/flower.py",),
    "matplotlib": ("report/",),
    "open_clip": ("models/teacher/openclip.py",),
    "openai": ("annotate/backends/openai.py",),
    "pydantic": ("annotate/schema.py",),
    "ray": ("annotate/backends/ray_data.py", "engines/flower.py"),
    "rich": ("console.py",),
    "timm": ("models/vision.py",),
    "tokenizers": ("models/teacher/",),
    "torchvision": ("models/bridge.py", "models/vision.py"),
    "transformers": ("models/teacher/", "annotate/backends/", "runs.py"),  # runs.py reads its version
    "trackio": ("trackers.py",),
    "tyro": ("overrides.py",),
    "wandb": ("trackers.py",),
}
"""Every other package, and the only files or folders that may import it."""
PRINTERS = ("cli.py", "commands/", "console.py", "models/teacher/")
"""What a person starts; everything else yields events (the teachers' recipe is a program)."""
LOOKS_AT_GLOBALS = ("conformance/generators.py",)
"""Compares the global generators before and after a method has run, and puts them back."""
DRAWS = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
DRAWS_IN_PLACE = {"bernoulli_", "exponential_", "normal_", "random_", "uniform_"}


class Import(NamedTuple):
    """One imported module, its line, and whether it is imported when the file is."""

    module: str
    line: int
    at_top: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """All imports of a file; ``from a import b`` counts as a and as a.b, ``import_module("a")`` as a."""
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    inside = {id(n) for block in [*later, *guarded] for n in ast.walk(block)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [module, *(f"{module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        line = node.lineno if isinstance(node, ast.stmt | ast.expr) else 0
        yield from (Import(name, line, id(node) not in inside) for name in names)


def breaches(package: Path) -> list[str]:
    """Every breach under the folder ``package``, sorted, as ``file:line: sentence``."""
    said: list[str] = []
    known: dict[str, set[str]] = {}
    files = {p.relative_to(package).as_posix(): p for p in sorted(package.rglob("*.py"))}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), name)
        said += [f"{name}:{line}: {what}" for line, what in _calls(name, tree)]
        if name.startswith("algorithms/"):
            said += [f"{name}:{line}: a hook stores on self; it belongs to the server's state or the client's memory"
                     for line in _stores(tree)]  # fmt: skip
        for found in imports(tree):
            said += [f"{name}:{found.line}: {what}" for what in _stranger(name, found.module)]
            if found.at_top:
                known.setdefault(name, set()).update(_file_of(found.module, files))
    said += [f"{loop[0]}:1: imports itself: {' > '.join(loop)}" for loop in _loops(known)]
    return sorted(set(said))


def _stranger(name: str, module: str) -> Iterator[str]:
    package = module.partition(".")[0]
    if not package:
        yield "relative import; write it out"
    elif package == "random" and name not in LOOKS_AT_GLOBALS:
        yield "random: draw from a named stream of mllm_fl.seeds"
    elif package not in {*sys.stdlib_module_names, *CORE, "mllm_fl"}:
        if package not in OWNERS:
            yield f"{package}: a package that nobody owns; name its owner in {Path(__file__).name}"
        elif not name.startswith(OWNERS[package]):
            yield f"{package} belongs to {' and '.join(OWNERS[package])}"


def _calls(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    forks = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    sheltered = {id(n) for fork in forks for n in ast.walk(fork)}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        called = ast.unparse(call.func)
        owner, _, last = called.rpartition(".")
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if called == "print" and not name.startswith(PRINTERS):
            yield call.lineno, "the library prints; yield an event"
        if called in ("np.load", "numpy.load") and words.get("allow_pickle") != "False":
            yield call.lineno, f"{called} without allow_pickle=False"
        if name == "seeds.py" or name in LOOKS_AT_GLOBALS:
            continue
        if last == "manual_seed" and id(call) not in sheltered:
            yield call.lineno, f"{called} seeds outside seeds.py and outside fork_rng"
        in_place = last in DRAWS_IN_PLACE and "init" not in owner
        if (in_place or (owner == "torch" and last in DRAWS)) and "generator" not in words:
            yield call.lineno, f"{called} draws from the global stream; hand it a generator"
        if owner in ("np.random", "numpy.random") and (last != "RandomState" or not call.args):
            yield call.lineno, f"{called}: draw from a named stream of mllm_fl.seeds"


def _stores(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(t).startswith("self.") for t in targets):
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("object.__setattr__", "setattr"):
            yield node.lineno


def _file_of(module: str, files: dict[str, Path]) -> set[str]:
    path = "/".join(module.split(".")[1:])
    return {f for f in (f"{path}.py", f"{path}/__init__.py") if module.startswith("mllm_fl.") and f in files}


def _loops(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Of each loop of imports the shortest way round, told by the file that comes first in the alphabet."""
    for start in sorted(graph):
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            if start in graph.get(path[-1], ()):
                if start == min(path):
                    yield [*path, start]
                break
            following = sorted(graph.get(path[-1], set()) - seen)
            seen.update(following)
            paths += [[*path, f] for f in following]


def test_the_source_keeps_its_habits() -> None:
    assert breaches(SOURCES) == []


PLANTED = {
    "matplotlib elsewhere": ("data/a.py", "from matplotlib import pyplot", "matplotlib belongs to report/"),
    "tyro elsewhere": ("config.py", "import tyro", "tyro belongs to overrides.py"),
    "by name": ("data/a.py", "import importlib\nimportlib.import_module('openai')", "data/a.py:2: openai belongs to"),
    "a stranger": ("report/a.py", "import leftpad", "leftpad: a package that nobody owns"),
    "relative": ("models/a.py", "from ..engines import local", "relative import"),
    "a print": ("stages/a.py", "print('hello')", "the library prints"),
    "NumPy's pickle": ("data/a.py", "np.load('x')", "without allow_pickle=False"),
    "the global stream": ("data/a.py", "torch.randperm(3)", "torch.randperm draws from the global stream"),
    "the global stream in place": ("models/a.py", "x.normal_()", "x.normal_ draws from the global stream"),
    "NumPy's global stream": ("data/a.py", "np.random.shuffle([1])", "np.random.shuffle: draw from a named stream"),
    "no seed": ("data/a.py", "np.random.RandomState()", "np.random.RandomState: draw from a named stream"),
    "the library's random": ("data/a.py", "import random", "random: draw from a named stream"),
    "a global seed": ("engines/a.py", "torch.manual_seed(1)", "torch.manual_seed seeds outside"),
    "a loop of two": ("data/a.py", "import mllm_fl.data.b", "imports itself: data/a.py > data/b.py > data/a.py"),
    "a loop of one": ("data/a.py", "from mllm_fl.data import a", "imports itself: data/a.py > data/a.py"),
    "a memory": ("algorithms/a.py", "class A:\n    def server(self):\n        self.v = 1", "a.py:3: a hook stores on self"),
    "a hidden memory": ("algorithms/a.py", "object.__setattr__(a, 'v', 1)", "a hook stores on self"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_breach_is_found(what: str, tmp_path: Path) -> None:
    where, code, sentence = PLANTED[what]
    other = "import mllm_fl.data.a" if what == "a loop of two" else ""
    for name, text in (("data/b.py", other), (where, code)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(sentence in b for b in breaches(tmp_path)), breaches(tmp_path)


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    allowed = {
        "algorithms/a.py": "import torch\ntorch.rand(3, generator=g)",
        "data/a.py": "def f():\n    import mllm_fl.data.b\nnp.random.RandomState(7)\nnp.load('x', allow_pickle=False)",
        "data/b.py": "import mllm_fl.data.a",
        "models/a.py": "with torch.random.fork_rng():\n    torch.manual_seed(1)\nnn.init.normal_(w)",
        "report/a.py": "import matplotlib",
        "cli.py": "print('hello')",
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert breaches(tmp_path) == []
