"""The ledger: answers survive, failures are not answers, two processes share the work."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_fl.annotate.ledger import Entry, Key, Ledger, Totals, canonical
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


def test_every_call_is_on_the_bill_also_those_that_failed(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.write([(KEYS[0], Entry(error="not JSON", prompt_tokens=10, completion_tokens=2, cost=0.5, requests=1))])
        ledger.write([(KEYS[0], Entry(("a",), None, 10, 3, 0.1, 0.25, 2, {"id": "x"}, source="a.jpg", licence="CC0"))])
        ledger.write(
            [(KEYS[0], Entry(("late",), None, 10, 3, 0.1, 0.25, 1))]
        )  # paid, though there is an answer already
        assert ledger.totals() == Totals(4, 30, 8, 1.0)
        (row,) = ledger.rows(KEYS)
        assert (row["prompt_tokens"], row["cost"], row["attempts"], row["answer"]) == (20, 0.75, 2, '["a"]')
        assert (row["source"], row["licence"], row["provenance"]) == ("a.jpg", "CC0", '{"id": "x"}')
        assert ledger.usage(KEYS)["cost"] == 0.75
        assert ledger.means("m", "caption")[:2] == (1, 20.0)


def test_the_first_of_several_answers_is_kept_while_the_question_stays_claimed(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.claim(KEYS[:2])
        ledger.write([(KEYS[0], Entry(("first",), None, 3, 1, partial=True, requests=1))])
        assert ledger.answers(KEYS) == {}
        assert ledger.partial(KEYS) == {KEYS[0]: ("first",)}
    with Ledger(
        tmp_path / "l.sqlite"
    ) as ledger:  # closed: the claim without an answer is gone, this one is open with what it has
        assert ledger.failures(KEYS) == {KEYS[0]: "interrupted"}
        assert ledger.claim(KEYS[:2]) == KEYS[:2]
        assert ledger.partial(KEYS) == {KEYS[0]: ("first",)}


def test_a_claim_that_is_let_go_leaves_an_older_failure_standing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.write([(KEYS[0], Entry(error="HTTP 500", prompt_tokens=7, requests=1))])
        ledger.claim(KEYS[:1])
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.failures(KEYS) == {KEYS[0]: "HTTP 500"}
        assert ledger.usage(KEYS)["prompt_tokens"] == 7


def test_a_renewed_claim_holds_and_one_in_a_batch_always_does(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.claim(KEYS[1:2], "batch:1")
        ledger.owner = f"elsewhere:{os.getpid()}:1.a"
        ledger.claim(KEYS[:1])
        sqlite3.connect(path, isolation_level=None).execute("UPDATE answers SET updated = updated - 901")
        ledger.renew()
        ledger.owner = "here"
        assert ledger.claim(KEYS[:2]) == []
        assert ledger.held("batch:1") == KEYS[1:2]
        assert not ledger.open(KEYS[1])
        ledger.release("batch:1")
        assert ledger.claim(KEYS[:2]) == KEYS[1:2]


def test_a_ledger_of_version_1_is_brought_up_to_date_and_nothing_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    old = sqlite3.connect(path, isolation_level=None)
    old.execute(
        "CREATE TABLE answers (image TEXT NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL,"
        " status TEXT NOT NULL CHECK (status IN ('claimed', 'ok', 'failed')), answer TEXT, error TEXT, prompt_tokens INTEGER,"
        " completion_tokens INTEGER, seconds REAL, attempts INTEGER NOT NULL DEFAULT 0, owner TEXT, updated REAL NOT NULL,"
        " PRIMARY KEY (image, kind, prompt, model, parameters)) WITHOUT ROWID"
    )
    old.execute("INSERT INTO answers VALUES (?,?,?,?,?,'ok','[\"a\"]',NULL,5,3,0.1,1,'x',0)", KEYS[0].columns)
    old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger.answers(KEYS) == {KEYS[0]: ("a",)}
            assert ledger.claim(KEYS[:1]) == []
            assert ledger.totals() == Totals(1, 5, 3, 0.0)
            assert ledger.usage(KEYS)["cost"] is None


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.write([(KEYS[0], Entry(("a",)))])
        pages = ledger.select("PRAGMA page_count", ())[0][0]
        ledger.select(f"PRAGMA max_page_count = {pages}", ())
        with pytest.raises(
            UserError,
            match=r"l\.sqlite: cannot be written \(database or disk is full\); what was answered before is kept",
        ):
            ledger.write([(KEYS[1], Entry(("b" * 100_000,)))])
        assert ledger.answers(KEYS) == {KEYS[0]: ("a",)}


def test_a_ledger_where_nothing_can_be_written_is_one_line() -> None:
    with pytest.raises(UserError, match="/proc/nowhere/l.sqlite: cannot be used as a ledger"):
        Ledger(Path("/proc/nowhere/l.sqlite"))


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
