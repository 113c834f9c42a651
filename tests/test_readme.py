"""README says what is so: its Python runs, and its tree names what is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_of_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert re.fullmatch(r"\d+\.\d% of the test digits, \d+\.\d% of the rare ones\n", capsys.readouterr().out)
    assert list(tmp_path.glob("runs/quickstart/*/model.safetensors"))


def test_the_toml_is_a_configuration(tmp_path: Path) -> None:
    from mllm_fl.config import load

    (block,) = blocks("toml")
    (tmp_path / "my.toml").write_text(block, encoding="utf-8")
    (config,) = load(tmp_path / "my.toml").runs
    assert config.federate.algorithm == "fedprox"
    assert config.align is not None
    assert config.pretrain is None


def tree() -> list[str]:
    """The paths that README's tree names, files and folders (a folder ends in a slash)."""
    (block,) = blocks("text")
    folders: list[str] = []
    found: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"[\w/]+(?:/|\.py)", re.split(r" {2,}", line.strip())[0]):
            found.append("".join(folders[:depth]) + name)
            if name.endswith("/"):
                folders[depth:] = [name]
    return found


def test_the_tree_names_what_is_there() -> None:
    named = tree()
    assert [path for path in named if not (ROOT / path).exists()] == []
    source = ROOT / "src/mllm_fl"
    there = {p.relative_to(ROOT).as_posix() for p in source.rglob("*.py") if p.name != "__init__.py"}
    assert {path for path in there if path not in named and not _inside_a_leaf(path, named)} == set()


def _inside_a_leaf(path: str, named: list[str]) -> bool:
    """Whether a folder that the tree does not open covers this file."""
    leaves = [d for d in named if d.endswith("/") and not any(n != d and n.startswith(d) for n in named)]
    return any(path.startswith(d) for d in leaves)


def test_make_knows_every_target_that_the_documents_name() -> None:
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {a or b for a, b in re.findall(r"`make ([a-z]+)|^\$ make ([a-z]+)", documents, re.MULTILINE)}
    assert {"quickstart", "test"} <= targets
    assert {t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)} == set()


NAMED = re.compile(r"\b(?:docs|scripts|benchmarks|experiments)/[\w./-]+\.(?:md|py|toml|svg)\b")


def test_every_page_and_script_that_anything_names_is_there() -> None:
    """A message that sends its reader to a page, a command in a document: what they name exists."""
    places = [*ROOT.glob("*.md"), ROOT / "Makefile", *ROOT.glob("deploy/*.md"), *ROOT.glob("experiments/*.toml")]
    for folder, kind in (("docs", "*.md"), ("src", "*.py"), ("scripts", "*.py"), ("benchmarks", "*.py")):
        places += ROOT.joinpath(folder).rglob(kind)
    missing = {
        f"{place.relative_to(ROOT)} names {name}"
        for place in places
        if place.name not in ("LOG.md", "CHANGELOG.md")  # these tell of what was
        for name in NAMED.findall(place.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing == set()
