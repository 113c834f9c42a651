"""LLaVA's record form: what is accepted, and each refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.annotate.agreement import agreement, stated
from mllm_fl.annotate.prompts import INSTRUCT, prompts_for
from mllm_fl.annotate.records import Record, Turn, load, parse, save
from mllm_fl.errors import UserError

GOOD: dict[str, Any] = {
    "id": "7", "image": "images/7.png", "model": "ignored",
    "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A seven."}],
}  # fmt: skip


def changed(**keys: Any) -> dict[str, Any]:
    return {k: v for k, v in (GOOD | keys).items() if v is not None}


def turns(*texts: str, speakers: str = "hg") -> list[dict[str, str]]:
    return [{"from": "human" if s == "h" else "gpt", "value": t} for s, t in zip(speakers, texts, strict=True)]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records = [
        Record(str(i), f"images/{i}.png", (Turn("human", "<image>\nq"), Turn("gpt", "ä")), "caption") for i in range(3)
    ]
    save(records, tmp_path / "records.json")
    assert load(tmp_path / "records.json") == records
    assert json.loads((tmp_path / "records.json").read_text())[1]["conversations"][1] == {"from": "gpt", "value": "ä"}
    assert parse(GOOD, "here").answers == ("A seven.",)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (["no object"], "expected an object, got list"),
        (changed(image=None), "'image' is missing"),
        (changed(conversations=[]), "'conversations' is missing or empty"),
        (changed(conversations=[{"from": "human"}]), "turn 1 lacks"),
        (changed(conversations=turns("<image>", "a", "b", speakers="hgh")), "human, gpt, human"),
        (changed(conversations=turns("<image>", "b", speakers="gh")), "gpt, human"),
        (changed(conversations=turns("q", "a")), "stands nowhere"),
        (changed(conversations=turns("<image> <image>", "a")), "stands in turns 1, 1"),
        (changed(conversations=turns("<image>", "see <image>")), "stands in turns 1, 2"),
        (changed(conversations=turns("<image>", "  ")), "answer in turn 2 is empty"),
        (changed(image="../../etc/passwd"), "leaves the image folder"),
        (changed(image="/etc/passwd"), "leaves the image folder"),
        (changed(image="a\\..\\..\\b"), "leaves the image folder"),
        (changed(image="C:\\b.png"), "leaves the image folder"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(raw: Any, says: str) -> None:
    with pytest.raises(UserError, match="^here: ") as e:
        parse(raw, "here")
    assert says in str(e.value)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    with pytest.raises(UserError, match="no such file"):
        load(path)
    for content, says in (
        ("[", "cannot be read"),
        ("{}", "not a list"),
        (json.dumps([GOOD, GOOD]), "record 2: id '7' occurs twice"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            load(path)
    with pytest.raises(UserError):
        save([Record("1", "x.png", (Turn("human", "no picture"), Turn("gpt", "a")))], tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_a_plain_prompt_makes_one_turn_per_question() -> None:
    record = prompts_for(["conversation"], "glyphs")[0].record("1", "i.png", ("q1 ?", "q2 ?"), (" a1", "a2 "))
    assert [t.text for t in record.turns] == ["<image>\nq1 ?", "a1", "q2 ?", "a2"]


def test_a_dialogue_prompt_reads_the_json_it_asked_for() -> None:
    prompt = INSTRUCT["conversation"]
    body = json.dumps([{"question": "How many?", "answer": "Two."}, {"question": "Where?", "answer": "Left."}])
    for text in (body, f"```json\n{body}\n```", f'{{"turns": {body}, "remark": "none"}}'):
        assert prompt.record("1", "i.png", ("ask",), (text,)).answers == ("Two.", "Left.")
    for text, why in (
        ("", "empty"),
        ("Two dogs.", "not JSON"),
        ("[]", "schema: turns: is empty"),
        ("7", "schema"),
        ('[{"question": "q"}]', "schema: turns.0.answer: field required"),
        ('[{"question": "q", "answer": " "}]', "turns.0.answer: is empty"),
        ("[1]", "schema: turns.0"),
    ):
        with pytest.raises(ValueError, match=why):
            prompt.record("1", "i.png", ("ask",), (text,))


def test_every_kind_has_a_prompt_in_both_styles_and_a_wording_is_fixed_by_the_image() -> None:
    for style in ("instruct", "glyphs"):
        prompts = prompts_for(list(INSTRUCT), style)
        assert [p.kind for p in prompts] == list(INSTRUCT)
        assert len({p.version for p in prompts}) == 4
    detail = prompts_for(["detail"], "instruct")[0]
    assert detail.questions("0" * 64) == detail.questions("0" * 64) != detail.questions("0" * 11 + "1" + "0" * 52)
    for kinds in (["poem"], ["detail", "detail"], []):
        with pytest.raises(UserError, match=r"annotate\.kinds"):
            prompts_for(kinds, "instruct")


def test_a_label_is_one_of_the_list_or_a_failure() -> None:
    (prompt,) = prompts_for(["label"], "instruct", ["cat", "grey seal"])
    (other,) = prompts_for(["label"], "instruct", ["cat", "seal"])
    assert prompt.version != other.version
    assert "cat, grey seal" in prompt.questions("0" * 64)[0]
    assert prompt.schema is not None and prompt.schema["properties"]["label"]["enum"] == ["cat", "grey seal"]
    for text in ('{"label": "Grey_Seal."}', "grey seal", '"grey seal"'):
        assert prompt.record("1", "i.png", ("ask",), (text,)).answers == ("grey seal",)
    for text in ('{"label": "seal"}', "a cat", '{"class": "cat"}', "[]", ""):
        with pytest.raises(ValueError, match="label|empty"):
            prompt.record("1", "i.png", ("ask",), (text,))
    with pytest.raises(UserError, match="not taught 'label'"):
        prompts_for(["label"], "glyphs", ["cat", "dog"])
    with pytest.raises(UserError, match=r"annotate\.labels"):
        prompts_for(["label"], "instruct", ["cat", "cat"])


def test_agreement_counts_what_a_text_states() -> None:
    scene = {"name": "three", "kind": "digit", "weight": "thin", "posture": "upright", "proportion": "wide"}
    assert stated("the picture shows the digit three . it leans to the left and its width is wide .") == {
        "name": "three", "kind": "digit", "posture": "left", "proportion": "wide"
    }  # fmt: skip
    assert stated("It is the letter a. It could be taken for the digit 4.")["name"] == "A"
    assert stated("the digit 4") == {"name": "four", "kind": "digit"}
    record = Record(
        "1", "i.png", (Turn("human", "<image>"), Turn("gpt", "the digit three , bold , stands upright .")), "caption"
    )
    found = agreement([record], {"i.png": scene})["caption"]
    assert (found["records"], found["false"]) == (1, 1)
    assert found["attributes"]["weight"] == {"stated": 1, "right": 0}
    assert found["attributes"]["name"] == {"stated": 1, "right": 1}
    assert agreement([record], {}) == {}
