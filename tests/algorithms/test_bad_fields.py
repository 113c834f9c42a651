"""A hyper-parameter out of range is one line: the field, the method, what is allowed, and what to write instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from mllm_fl.algorithms import METHODS, find
from mllm_fl.errors import UserError


def numbers() -> Iterator[tuple[str, str]]:
    """(method, field) of every field that holds a number."""
    for name in METHODS:
        for f in dataclasses.fields(find(name)):
            if isinstance(f.default, int | float) and not isinstance(f.default, bool):
                yield name, f.name


@pytest.mark.parametrize(("name", "field"), list(numbers()))
def test_every_number_has_a_range(name: str, field: str) -> None:
    cls = find(name)
    default: Any = {f.name: f.default for f in dataclasses.fields(cls)}[field]
    for value in (-1, float("nan")):
        with pytest.raises(UserError) as e:
            cls(**{field: value})
        line = str(e.value)
        assert line.startswith(f"federate.method.{field}: {cls.__name__} needs {field} in ")
        assert f", not {value}; the default is {default}" in line
        assert "\n" not in line


def test_the_line_by_hand() -> None:
    with pytest.raises(UserError) as e:
        find("fedavgm")(momentum=1)  # type: ignore[call-arg]
    said = "federate.method.momentum: FedAvgM needs momentum in [0, 1), not 1; the default is 0.9, 0.0 is FedAvg"
    assert str(e.value) == said
    for cls, field, value in (("ccvr", "lr", 0), ("scaffold", "control", 1.5), ("ratioloss", "lr", 1001)):
        with pytest.raises(UserError, match=f"needs {field} in"):
            find(cls)(**{field: value})
    assert find("scaffold")(control=1.0) and find("ratioloss")(lr=1000)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "field"), [("fedavgm", "form"), ("logitadjust", "prior"), ("balancedsoftmax", "prior")]
)
def test_words_have_their_list(name: str, field: str) -> None:
    cls = find(name)
    with pytest.raises(
        UserError, match=f"federate.method.{field}: {cls.__name__} knows no {field} 'x'; use '.*' or '.*'"
    ):
        cls(**{field: "x"})
