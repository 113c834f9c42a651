"""What importing costs, and what a machine needs: the core runs where only torch and a handful of packages are."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENOUGH = ("torch", "numpy", "pyarrow", "Pillow", "safetensors", "transformers")
"""All that a GPU machine without network has to have, beside what these require themselves."""
OPTIONAL = {"datasets", "flwr", "imagehash", "matplotlib", "openai", "pydantic", "rich", "sklearn", "timm", "torchvision", "trackio", "tyro"}  # fmt: skip
USES_FLWR = {"mllm_fl.engines.flower"}  # importing this one is using flwr


def _python(program: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _absent() -> str:
    """Top-level modules that are installed here and that a machine with no more than ENOUGH does not have, comma-separated."""
    there: set[str] = set()
    wanted = [canonicalize_name(name) for name in ENOUGH]
    while wanted:
        name = wanted.pop()
        if name in there:
            continue
        there.add(name)
        try:
            needed = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError:
            continue
        wanted += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    installed = packages_distributions().items()
    missing = {module for module, dists in installed if not {canonicalize_name(d) for d in dists} & there}
    return ",".join(sorted(missing - {"mllm_fl"} | OPTIONAL))


BARELY = """
import sys
from importlib.machinery import PathFinder
absent = set(sys.argv[1].split(","))
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_the_bare_machine_of_these_tests_is_bare() -> None:
    program = "import importlib.util\nprint([n for n in ('tyro', 'rich', 'torch') if importlib.util.find_spec(n)])"
    assert "sklearn" in _absent().split(",")
    assert "torch" not in _absent().split(",")
    assert _python(BARELY + program, _absent()).strip() == "['torch']"


def test_every_module_imports_on_a_bare_machine_and_draws_and_connects_nothing() -> None:
    program = f"""
import importlib, pkgutil, numpy, torch, transformers, mllm_fl
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
streams = torch.get_rng_state(), str(numpy.random.get_state())
names = [m.name for m in pkgutil.walk_packages(mllm_fl.__path__, "mllm_fl.") if m.name not in {USES_FLWR}]
for name in names:
    importlib.import_module(name)
assert torch.equal(streams[0], torch.get_rng_state()) and streams[1] == str(numpy.random.get_state())
assert not torch.cuda.is_initialized()
print(len(names), sockets)
"""
    count, _, sockets = _python(BARELY + program, _absent()).partition(" ")
    assert int(count) > 40
    assert sockets.strip() == "[]"


def test_the_core_runs_on_a_bare_machine(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from mllm_fl.config import from_dict
from mllm_fl.stages import chain
raw = {
    "data": {"source": "digits", "clients": 2, "partition": "iid", "image_size": 8},
    "model": {"width": 2},
    "federate": {"rounds": 1, "clients_per_round": 2, "local": {"epochs": 1, "augment": "none"}},
}
final = chain.run(from_dict(raw, "here"), Path(sys.argv[2]))
print(final["rounds"], len(final["last"]["per_class"]))
"""
    assert _python(BARELY + program, _absent(), str(tmp_path)).split() == ["1", "10"]


def test_help_loads_nothing_but_the_standard_library() -> None:
    program = """
import sys
before = set(sys.modules)
from mllm_fl.cli import main
try:
    main(["--help"])
except SystemExit as e:
    assert e.code == 0
print("MODULES", *sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
"""
    shown, _, modules = _python(program).partition("MODULES ")
    assert "usage: mllm-fl" in shown
    assert set(modules.split()) - set(sys.stdlib_module_names) == {"mllm_fl"}


def test_versions_are_pinned_without_hosts() -> None:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    assert all(len(pin) == 2 and pin[1][0].isdigit() and not set("".join(pin)) & set("/@:; ") for pin in pins)
