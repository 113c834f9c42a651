"""What a report and a table do with input that is not what it should be: one line that names the place, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.report.folders import run_folder

from mllm_fl.errors import UserError
from mllm_fl.report import build
from mllm_fl.results import collect, read


def refused(says: str, *folders: Path) -> None:
    """The report on these folders is refused in one line, and nothing is written."""
    out = folders[0].parent / "report.html"
    with pytest.raises(UserError, match=says) as found:
        build(list(folders), out)
    assert "\n" not in str(found.value) and not out.exists()


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(r"empty: not a run folder \(neither final.json nor config.toml\)", tmp_path / "empty")
    refused("nowhere: no such folder", tmp_path / "nowhere")


def test_a_half_written_run_alone_is_refused_and_beside_others_is_listed(tmp_path: Path) -> None:
    whole, half = run_folder(tmp_path, "whole"), run_folder(tmp_path, "half")
    (half / "final.json").unlink()
    with open(half / "rounds.jsonl", "a") as f:
        f.write('{"round": 5, "accu')  # killed while it wrote
    refused("none of 1 runs is finished; the command that began it resumes it", half)
    text = build([whole, half], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "half, seed 0" in text and "1 finished run" in text


def test_runs_with_different_classes_are_not_one_report(tmp_path: Path) -> None:
    ours = run_folder(tmp_path)
    refused(
        r"its classes \(3: un, deux, trois …\) are not those of",
        ours,
        run_folder(tmp_path, names=("un", "deux", "trois")),
    )
    refused(r"its classes \(4: ", ours, run_folder(tmp_path, names=("zero", "one", "two", "three")))


def test_a_broken_line_in_a_results_file_is_named_with_its_number(tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    collect([run_folder(tmp_path)], results)
    with open(results, "a") as f:
        f.write(json.dumps({"arm": "x"}) + '\n{"arm": "half\n')
    with pytest.raises(
        UserError, match=r"r\.jsonl:3: broken line; delete that line, and collect its run again"
    ) as found:
        read(results)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "null",
        "{}",
        '{"arm": "x"}',
        '{"arm": "x", "last": {"accuracy": "hi"}}',
        '{"arm": "x", "last": {"accuracy": NaN}}',
    ],
)
def test_a_line_that_is_no_finished_run_is_named_by_table_and_figure(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mllm_fl.cli import main

    results = tmp_path / "r.jsonl"
    collect([run_folder(tmp_path)], results)
    with open(results, "a") as f:
        f.write(line + "\n")
    for words in (["table", "2", str(results)], ["figure", "3", str(results), "--out", str(tmp_path / "f.html")]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "r.jsonl:2: is no finished run" in said and said.count("\n") == 1
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["table", "2", str(tmp_path / "empty.jsonl")]) == 2
    assert "empty.jsonl: holds no run" in capsys.readouterr().err
