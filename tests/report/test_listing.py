"""Which runs there are: states told without disturbing them, broken folders named, and what two configurations differ in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.report.folders import run_folder

from mllm_fl.cli import main
from mllm_fl.errors import UserError
from mllm_fl.report import listing
from mllm_fl.runs import RunFolder


def test_states_progress_and_headline(tmp_path: Path) -> None:
    done, half, bad = (run_folder(tmp_path, arm) for arm in ("a", "b", "c"))
    (half / "final.json").unlink()
    with open(half / "rounds.jsonl", "ab") as f:
        f.write(b'{"round": 5, "accur')
    (bad / "final.json").write_text("{")
    found = {e.folder: e for e in listing.entries(tmp_path)}
    assert (found[done].state, found[done].done, found[done].accuracy) == ("finished", 4, 0.5)
    assert found[done].rule == "mean of the last 4 rounds"
    assert (found[half].state, found[half].done, found[half].rounds, found[half].accuracy) == ("interrupted", 4, 4, 0.5)
    assert found[bad].state == "broken" and found[bad].rule.startswith("final.json: cannot be read as JSON")
    text = listing.to_text(list(found.values()), tmp_path)
    assert text.splitlines()[-1] == "1 finished, 1 interrupted, 1 broken"
    assert "50.0 %" in text


def test_a_run_that_was_aligned_once_is_quoted_with_its_last_round(tmp_path: Path) -> None:
    run_folder(tmp_path, curve="unaligned")
    (found,) = listing.entries(tmp_path)
    assert found.rule == "last round"


@pytest.mark.parametrize("locks", [listing.LOCKS, Path("/nowhere")])
def test_a_running_run_is_known_by_its_lock_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: Path
) -> None:
    monkeypatch.setattr(listing, "LOCKS", locks)
    code = "import sys, pathlib; from mllm_fl.runs import RunFolder\nwith RunFolder(pathlib.Path(sys.argv[1]), {'federate': {'rounds': 9}}): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        (found,) = listing.entries(tmp_path)
        assert (found.state, found.done, found.rounds, found.accuracy) == ("running", 0, 9, None)
        holder.communicate("\n")
    assert listing.entries(tmp_path)[0].state == "interrupted"
    RunFolder(tmp_path / "r", {"federate": {"rounds": 9}}).close()


def test_nothing_to_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder here"):
        listing.entries(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        listing.entries(tmp_path / "absent")


def test_watch_draws_again_when_something_changed(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "a")
    final = (run / "final.json").read_text()
    (run / "final.json").unlink()
    command = [sys.executable, "-m", "mllm_fl.cli", "runs", str(tmp_path), "--watch", "--every", "0.05"]
    with subprocess.Popen(command, stdout=-1, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as watching:
        assert watching.stdout is not None
        first = [watching.stdout.readline() for _ in range(3)]
        assert first[-1] == "1 interrupted\n"
        time.sleep(0.2)
        (run / "final.json").write_text(final)
        assert [watching.stdout.readline() for _ in range(3)][-1] == "1 finished\n"
        watching.terminate()
        assert watching.wait(60) == 0


def test_diff_prints_each_value_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path, "a"), run_folder(tmp_path, "b", 1, stages=(False, True))
    assert main(["diff", str(a), str(b)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["align.beta", "–", "1.0"], ["name", "a", "b"], ["seed", "0", "1"]]
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "no difference: all 5 values are equal\n"
    assert main(["diff", str(a), str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_runs_is_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, "\x1b[31mred")
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "\x1b" not in out
    assert main(["runs", str(tmp_path), "--every", "0"]) == 2
    assert json.loads((tmp_path / "run0-0" / "final.json").read_text())["arm"].startswith("\x1b")
