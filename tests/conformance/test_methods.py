"""Every method of the package against every check of the suite; a new method joins by its row in ``mllm_fl.conformance.row.ROWS``."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from mllm_fl.algorithms import METHODS, find
from mllm_fl.algorithms.base import Algorithm, Task
from mllm_fl.conformance.play import play as play_world
from mllm_fl.conformance.row import ROWS, row_of
from mllm_fl.conformance.suite import CHECKS, judge
from mllm_fl.conformance.toy import World, images
from mllm_fl.data.images import ImageSet
from mllm_fl.trees import Tree
from tests import toy


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == sorted(METHODS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", METHODS)
def test_conforms(name: str, check: str) -> None:
    verdict = judge(row_of(name), check)
    assert verdict.status == "ok", f"{name}: {verdict.sentence}"


@pytest.mark.parametrize("name", METHODS)
def test_its_file_says_where_it_comes_from(name: str) -> None:
    assert "arXiv" in (__import__(find(name).__module__, fromlist=["x"]).__doc__ or "")


def test_files_stay_short() -> None:
    """CReFF and CLIP2FL within 150 lines each; FedProx's body, the hooks without its docstrings, within ten."""
    for name in ("creff", "clip2fl"):
        assert len(inspect.getsource(inspect.getmodule(find(name)) or find(name)).splitlines()) <= 150
    (body,) = ast.parse(inspect.getsource(find("fedprox"))).body
    assert isinstance(body, ast.ClassDef)
    lines = [n for n in body.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    assert sum(len(ast.unparse(n).splitlines()) for n in lines) <= 10


def play(
    method: Algorithm, shards: list[ImageSet], rounds: int = 2, arrival: list[int] | None = None
) -> tuple[Task, Tree]:
    """A few rounds on the tests' own toy federation (ResNet-8 of width 2): the task and what is deployed."""
    task, w = toy.task(toy.federation())
    task = dataclasses.replace(
        task,
        population=tuple(map(len, shards)),
        unlabelled=images(20, seed=5) if "unlabelled" in method.needs else None,
        labelled=images(4, seed=6) if "labelled" in method.needs else None,
    )
    played = play_world(method, World(task, w, tuple(shards), shards[0]), rounds, arrival=arrival)
    return task, played.deployed


def some_clients() -> list[ImageSet]:
    fed = toy.federation(clients=3)
    return [fed.client(k) for k in range(3)]
