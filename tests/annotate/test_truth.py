"""What a record claims, held against what is known of its picture; rates that can be counted by hand."""

from __future__ import annotations

import pytest
from tests.annotate.corpora import record

from mllm_fl.annotate.hallucination import judge, rates, wilson
from mllm_fl.annotate.objects import Words, everyday
from mllm_fl.annotate.records import Record, Turn
from mllm_fl.annotate.truth import claims

PHOTO = {"captions": ["A brown dog runs on the beach .", "A puppy with a red ball ."]}
SHAPE = {"shape": "circle", "colour": "teal", "qa": [{"question": "is there not a red shape?", "answer": "yes"}]}
LABELS = Words({"can": (), "maple tree": (), "trout": ()})


def asked(question: str, answer: str) -> Record:
    return Record("1", "a.png", (Turn("human", f"<image>\n{question}"), Turn("gpt", answer)), "conversation")


def test_things_are_named_by_any_of_their_words_once_and_whole() -> None:
    assert everyday().named("Two puppies chase a dog; a hot dog lies on a bench.") == ["dog", "hot dog", "bench"]
    assert everyday().named("catalogue, carpet, busy") == []


def test_of_captions_what_nobody_mentioned_is_false() -> None:
    found = claims(record("1", "a.png", "A dog catches a frisbee on the beach."), PHOTO, LABELS)
    assert (found.made, found.false) == (3, ("frisbee",))


def test_what_is_denied_is_not_claimed() -> None:
    found = claims(record("1", "a.png", "A dog without a ball, and there is no cat or horse."), PHOTO, LABELS)
    assert (found.made, found.false) == (1, ())


@pytest.mark.parametrize(
    ("question", "answer", "made", "false"),
    [
        ("Is there a dog in the picture?", "Yes.", 1, ()),
        ("Is there a cat in the picture?", "Yes, there is.", 1, ("cat",)),
        ("Is there a dog in the picture?", "No.", 1, ("no dog",)),
        ("Is there a cat in the picture?", "No.", 1, ()),
        ("What is the dog doing?", "It sits on a bench.", 1, ("bench",)),
    ],
)
def test_yes_and_no_claim_what_the_question_asks(question: str, answer: str, made: int, false: tuple[str, ...]) -> None:
    found = claims(asked(question, answer), PHOTO, LABELS)
    assert (found.made, found.false) == (made, false)


def test_a_known_question_is_held_against_its_answer() -> None:
    assert claims(asked("Is there not a red shape?", "Yes."), SHAPE, LABELS).false == ()
    assert len(claims(asked("Is there not a red shape?", "No."), SHAPE, LABELS).false) == 1


def test_shapes_and_labels() -> None:
    assert claims(record("1", "a.png", "A drawing of a red circle."), SHAPE, LABELS).false == ("red",)
    truth = {"labels": ["trout"]}
    assert claims(record("1", "a.png", "A photo of a maple tree; nothing more can be seen."), truth, LABELS).false == (
        "maple tree",
    )
    assert claims(record("1", "a.png", "A photo of a can."), truth, LABELS).false == ("can",)
    assert claims(record("1", "a.png", "All that one can see is a trout."), truth, LABELS) == claims(
        record("2", "a.png", "a trout"), truth, LABELS
    )


def test_glyphs_by_their_scene() -> None:
    scene = {"name": "seven", "kind": "digit", "weight": "thin", "posture": "upright", "proportion": "wide"}
    found = claims(
        record("1", "a.png", "It is the digit seven , bold , and stands upright ."), {"glyph": scene}, LABELS
    )
    assert found.false == ("weight bold",) and found.made == 4


def test_rates_are_counted_per_truth_and_kind() -> None:
    records = [
        record("1", "a.png", "A dog and a cat."),
        record("2", "a.png", "A ball."),
        record("3", "a.png", "Nice."),
        record("4", "b.png", "A dog."),
        record("5", "c.png", "A dog."),
    ]
    truths = {"a.png": PHOTO, "b.png": {"labels": ["dog"]}}
    photo, label = rates(records, truths, judge(records, truths))
    assert (photo["records"], photo["decidable"], photo["statements"], photo["false"], photo["records_false"]) == (
        3,
        2,
        3,
        1,
        1,
    )
    assert photo["false_share"] == pytest.approx(1 / 3) and photo["records_false_share"] == 0.5
    assert (label["truth"], label["records"], label["false"]) == ("labels", 1, 0)


def test_wilsons_interval() -> None:
    """10 of 100 at 95 %: 5.52 to 17.44 % (Brown, Cai, DasGupta 2001, table of examples computed by hand); symmetric; never outside 0..1."""
    assert wilson(10, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    low, high = wilson(3, 8)
    assert wilson(5, 8) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == pytest.approx(1.0)
