"""The ledger: answers survive, failures are not answers, two processes share the work."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_fl.annotate.ledger import Entry, Key, Ledger, canonical
from mllm_fl.errors import UserError

KEYS = [Key(f"{i:064x}", "caption", "caption-1", "m", canonical({"b": 1, "a": 2})) for i in range(4)]


def test_parameters_are_equal_for_equal_values() -> None:
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1}) == '{"a": 2, "b": 1}'


def test_an_answer_is_found_again_and_never_asked_or_replaced(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.claim(KEYS[:1]) == KEYS[:1]
        ledger.write([(KEYS[0], Entry(("yes", "no"), prompt_tokens=3, completion_tokens=2, seconds=0.5))])
        ledger.write([(KEYS[0], Entry(error="late failure"))])
    with Ledger(tmp_path / "l.sqlite") as again:
        assert again.answers(KEYS) == {KEYS[0]: ("yes", "no")}
        assert again.claim(KEYS[:2]) == KEYS[1:2]
        assert again.usage(KEYS) == {
            "prompt_tokens": 3, "completion_tokens": 2, "seconds": 0.5, "attempts": 1, "cost": None
        }  # fmt: skip


def test_a_failure_is_remembered_asked_again_and_never_an_answer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.write([(KEYS[0], Entry(error="HTTP 500"))])
        assert ledger.answers(KEYS) == {}
        assert ledger.failures(KEYS) == {KEYS[0]: "HTTP 500"}
        assert ledger.claim(KEYS[:1]) == KEYS[:1]
        ledger.write([(KEYS[0], Entry(("now",)))])
        assert ledger.answers(KEYS) == {KEYS[0]: ("now",)}
        assert ledger.usage(KEYS)["attempts"] == 2


def test_every_part_of_the_key_makes_another_question(tmp_path: Path) -> None:
    k = KEYS[0]
    others = [Key("f" * 64, *k.columns[1:])] + [
        Key(*(c + "x" if i == j else c for i, c in enumerate(k.columns))) for j in range(1, 5)
    ]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.write([(k, Entry(("a",)))])
        assert ledger.answers([k, *others]) == {k: ("a",)}


def test_what_one_holds_the_other_does_not_get_until_it_lets_go(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "l.sqlite")
    assert first.claim(KEYS[:2]) == KEYS[:2]
    assert second.claim(KEYS) == KEYS[2:]
    first.write([(KEYS[0], Entry(("a",)))])
    first.close()
    assert second.claim(KEYS) == KEYS[1:]  # its own again, and what the first gave back
    second.close()


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.annotate.test_ledger import KEYS; from mllm_fl.annotate.ledger import Ledger\n"
        "l = Ledger(Path(sys.argv[1])); l.claim(KEYS); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    with Ledger(path) as ledger:
        assert ledger.claim(KEYS) == KEYS


def test_a_claim_from_another_machine_holds_until_its_lease_ends(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.owner = f"elsewhere:{os.getpid()}:1.a"
        ledger.claim(KEYS[:1])
        ledger.owner = "here"
        assert ledger.claim(KEYS[:1]) == []
        sqlite3.connect(path, isolation_level=None).execute("UPDATE answers SET updated = updated - 901")
        assert ledger.claim(KEYS[:1]) == KEYS[:1]


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA user_version = 9")
    db.execute("CREATE TABLE answers (x)")
    db.close()
    with pytest.raises(UserError, match="ledger of version 9, this program writes version 2"):
        Ledger(path)
    (tmp_path / "text").write_text("no database, but a long enough text to be looked at as if it were one" * 9)
    with pytest.raises(UserError, match="cannot be used as a ledger"):
        Ledger(tmp_path / "text")
