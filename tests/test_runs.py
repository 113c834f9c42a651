"""The run folder: one process at a time, one configuration, rows that can be cut back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mllm_fl.errors import UserError
from mllm_fl.runs import RunFolder, differences, environment, read_final, read_json, read_rows


def test_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    code = "from pathlib import Path; from mllm_fl.runs import RunFolder; import sys\ntry:\n  RunFolder(Path(sys.argv[1]), {})\nexcept Exception as e: print(e)"
    with RunFolder(tmp_path / "r", {}):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, check=True
        )
    assert "another process is working in this run folder" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_another_configuration_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r", {"seed": 0, "federate": {"rounds": 3, "local": {"lr": 0.1}}}):
        pass
    with pytest.raises(
        UserError,
        match=r"begun with another configuration: federate.local.lr \(0.1 -> 0.2\); federate.x \(absent -> 1\)",
    ):
        RunFolder(tmp_path / "r", {"seed": 0, "federate": {"rounds": 3, "local": {"lr": 0.2}, "x": 1}})
    RunFolder(tmp_path / "r", {"seed": 0, "federate": {"rounds": 3, "local": {"lr": 0.1}}}).close()


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/r: the run folder cannot be written: Not a directory; choose another"):
        RunFolder(tmp_path / "file" / "r", {})


def test_rows_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r", {}) as run:
        run.append("rounds.jsonl", [{"round": 1}])
        lengths = run.lengths()
        run.append("rounds.jsonl", [{"round": 2}])
        run.append("clients.jsonl", [{"round": 2}])
        run.rewind(lengths)
        assert read_rows(run.path / "rounds.jsonl") == [{"round": 1}]
        assert read_rows(run.path / "clients.jsonl") == []
        with pytest.raises(UserError, match="but the checkpoint was written when it had 999"):
            run.rewind({"rounds.jsonl": 999})


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"rounds.jsonl:2: broken line"):
        read_rows(tmp_path / "rounds.jsonl")
    (tmp_path / "final.json").write_text("{")
    with pytest.raises(UserError, match=r"final.json: cannot be read as JSON"):
        read_json(tmp_path / "final.json")


def test_differences_and_environment() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    env = environment()
    assert env["torch"] and env["processor"] and env["deterministic"].startswith("yes")


def test_a_run_that_is_refused_before_it_began_is_not_left_behind_as_interrupted(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunFolder(tmp_path / "a", {"x": 1}):
        raise UserError("align.per_class", "too many")
    assert not (tmp_path / "a" / "config.toml").exists()
    with RunFolder(tmp_path / "b", {"x": 1}) as run:
        run.write_json("env.json", {})
    with pytest.raises(UserError), RunFolder(tmp_path / "d", {"x": 1}):  # noqa: PT012
        (tmp_path / "d" / "rounds.jsonl").write_text("{}\n")
        raise UserError("round 1", "something")
    assert (tmp_path / "d" / "config.toml").exists()
    assert (tmp_path / "b" / "config.toml").exists()
    with pytest.raises(UserError), RunFolder(tmp_path / "b", {"x": 1}):
        raise UserError("resumed", "refused")
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "c", {"x": 1}):
        raise KeyboardInterrupt
    assert (tmp_path / "b" / "config.toml").exists() and (tmp_path / "c" / "config.toml").exists()


def test_json_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"env.json: holds list where an object is expected"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"env.json: cannot be read as JSON"):
        read_json(path)


def test_an_empty_record_is_no_finished_run(tmp_path: Path) -> None:
    path = tmp_path / "final.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"final.json: is no finished run's record: it lacks 'name'"):
        read_final(path)
    with RunFolder(tmp_path, {}) as run, pytest.raises(UserError, match="is no finished run's record"):
        run.final  # noqa: B018 (a property that reads)
