"""A round is chosen on images that nobody else uses, and never by its test accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import toy

from mllm_fl.config import from_dict
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows
from mllm_fl.stages import chain
from mllm_fl.stages.validation import chosen, held_out


def test_images_are_left_over_balanced_and_nobody_else_s() -> None:
    fed = toy.federation(per_class=20, imbalance=10)  # class 0 is kept whole
    align = fed.leftover.subset([0, 1, 2, 3], "align")
    found = held_out(fed, 4, (align, None), seed=7)
    assert found.class_counts() == [0, 4, 4]
    assert found.name.endswith("4 a class, none of class 0")
    held = {h for k in range(4) for h in fed.client(k).hashes()}
    assert not set(found.hashes()) & (held | set(align.hashes()))
    assert held_out(fed, 4, (align,), seed=7).hashes() == found.hashes()
    for other, asked in ((fed, 99), (toy.federation(), 1)):
        with pytest.raises(
            UserError, match=f"3 of 3 classes have no {asked} images that nobody else uses; ask for fewer"
        ):
            held_out(other, asked, (), seed=7)


def test_the_first_best_round_on_validation_is_quoted_by_its_test_accuracy() -> None:
    fed = toy.federation(imbalance=10)
    rows: list[dict[str, Any]] = [
        {"round": 1, "accuracy": 0.9, "validation": 0.2}, {"round": 2, "accuracy": 0.5, "validation": 0.6},
        {"round": 3, "accuracy": 0.8, "validation": 0.6}, {"round": 4, "accuracy": None, "validation": None},
    ]  # fmt: skip
    found = chosen(rows, fed.test)
    assert found is not None and (found["round"], found["accuracy"], found["validation"]) == (2, 0.5, 0.6)
    assert chosen(rows, None) is None and chosen([{"round": 1}], fed.test) is None


def test_a_run_scores_its_validation_images_and_says_which_round_they_chose(tmp_path: Path) -> None:
    raw = {
        "data": {"source": "digits", "clients": 4, "imbalance_factor": 10, "image_size": 8},
        "model": {"width": 2},
        "federate": {"rounds": 3, "clients_per_round": 2, "validation_per_class": 5, "evaluate_every": 2, "evaluate_last": 1,
                     "local": {"epochs": 1, "augment": "none"}},
        "align": {"source": "leftover", "per_class": 5, "beta": 0.0, "steps": 2, "augment": "none", "when": "end"},
    }  # fmt: skip
    final = chain.run(from_dict(raw, "here"), tmp_path)
    rows = read_rows(next(tmp_path.glob("*/*/rounds.jsonl")))
    assert [row["validation"] is None for row in rows] == [
        True,
        False,
        False,
    ]  # rows are unaligned, and so are their scores
    assert final["chosen"]["round"] == 2 and final["chosen"]["accuracy"] == rows[1]["accuracy"]
    assert final["leaks"]["validation/test"] == 0
    with pytest.raises(UserError, match="validation_per_class: 0 is below 1"):
        from_dict({"federate": {"validation_per_class": 0}}, "here")
