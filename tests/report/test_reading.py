"""Run folders are read as they are: whole ones count, begun ones are named, broken ones are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report.folders import run_folder

from mllm_fl.errors import UserError
from mllm_fl.report.reading import read


def test_seeds_of_an_arm_are_grouped_and_ordered(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, arm, seed) for arm, seed in (("b", 2), ("a", 0), ("b", 0), ("b", 1))]
    found = read([*folders, folders[0]])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in found.arms] == [("b", [0, 1, 2]), ("a", [0])]


def test_an_alignment_afterwards_is_an_arm_without_rounds(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "fedavg")
    final = json.loads((folder / "final.json").read_text())
    final |= {"arm": "fedavg, aligned once", "before_align": final["last"], "mean_last": None}
    (folder / "aligned.json").write_text(json.dumps(final))
    plain, aligned = read([folder]).arms
    assert (plain.name, aligned.name) == ("fedavg", "fedavg, aligned once")
    assert plain.first.rounds and not aligned.first.rounds


def test_a_run_that_is_killed_while_it_writes_a_line_is_unfinished_and_no_error(tmp_path: Path) -> None:
    done, half = run_folder(tmp_path, "a"), run_folder(tmp_path, "b", accuracy=0.25)
    (half / "final.json").unlink()
    with open(half / "rounds.jsonl", "ab") as f:
        f.write(b'{"round": 5, "accur')
    (left,) = read([done, half]).unfinished
    assert (left.name, left.done, left.rounds, left.accuracy) == ("b, seed 0", 4, 4, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"]}, "final.json: last.confusion is not a table of 2 × 2 counts"),
        ({"class_names": []}, "final.json: class_names is not a list of names"),
        ({"last": None}, "final.json: has no scores of the last round"),
        ({"class_counts": [1]}, "final.json: class_counts has not one value for each of the 3 classes"),
        ({"seed": "zero"}, "final.json: seed is 'zero', not a whole number"),
        ({"groups": {"many": [7]}}, r"final.json: groups.many is not a list of classes \(0 .. 2\)"),
        ({"leaks": {"train/test": "none"}}, "final.json: leaks are not counts"),
    ],
)
def test_a_final_record_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read([run_folder(tmp_path, **change)])


def test_a_federation_of_another_form_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "federation.json").write_text('{"clients": [{"histogram": [1, 2, 3]}, {"histogram": [1, -2, 3]}]}')
    with pytest.raises(UserError, match="federation.json: client 1 has not one count for each of the 3 classes"):
        read([folder])


@pytest.mark.parametrize("line", ["{", "7", '{"accuracy": 1}', '{"round": "x"}'])
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    folder = run_folder(tmp_path)
    with open(folder / "rounds.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(UserError, match=r"rounds.jsonl:5: "):
        read([folder])


def test_what_is_absent_is_allowed(tmp_path: Path) -> None:
    keep = ("class_names", "last")
    folder = run_folder(tmp_path)
    final = {k: v for k, v in json.loads((folder / "final.json").read_text()).items() if k in keep}
    for path in folder.iterdir():
        path.unlink()
    (folder / "final.json").write_text(json.dumps(final | {"last": {}}))
    (arm,) = read([folder]).arms
    assert (arm.name, arm.first.seed, arm.first.config) == ("–", -1, {})
