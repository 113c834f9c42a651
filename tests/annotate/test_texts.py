"""Checks that need the text alone: what is planted is found, what is plain is let through."""

from __future__ import annotations

import pytest
from tests.annotate.corpora import record

from mllm_fl.annotate.prompts import INSTRUCT
from mllm_fl.annotate.quality import texts
from mllm_fl.annotate.truth import COLOURS

PLAIN = (
    "A dog runs on the beach.", "two dogs playing in the snow", "It is seven.", "The man cannot see the ball, and the dog can.",
    "A sign says stop. Two cars wait behind it, and a third one turns left.",
)  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_plain_answers_pass_every_check(text: str) -> None:
    r = record("1", "a.png", text)
    assert [f(r) for f in (texts.refusal, texts.truncation, texts.leakage, texts.repetition)] == [None] * 4


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I cannot see pictures.",
        "Please upload an image first.",
        "I am unable to view the image.",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert texts.refusal(record("1", "a.png", "A dog.", text)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "A man who is standing in front of a",
        "The picture shows a dog. Behind it there is a house and the sky is",
        "First, a red car,",
    ],
)
def test_an_answer_that_stops_in_the_middle_is_seen(text: str) -> None:
    assert texts.truncation(record("1", "a.png", text)) is not None


@pytest.mark.parametrize(
    "text",
    [
        "The provided image shows a dog.",
        "According to the captions, a dog runs.",
        "A dog. USER: what else?",
        '[{"question": "What?", "answer": "A dog."}]',
        "A dog.</s>",
        "The bounding box is empty.",
    ],
)
def test_leaked_prompts_are_seen(text: str) -> None:
    assert texts.leakage(record("1", "a.png", text)) is not None


def test_words_of_our_own_instruction_are_seen() -> None:
    said = " ".join(INSTRUCT["detail"].system.split()[:12])
    assert "repeats the instruction" in str(texts.leakage(record("1", "a.png", said)))
    assert texts.leakage(record("1", "a.png", " ".join(said.split()[:7]))) is None  # seven words in a row may be chance


def test_repetition_within_an_answer_and_over_all_answers() -> None:
    loop = "there is a dog on the grass and " * 4
    assert "4 times" in str(texts.repetition(record("1", "a.png", loop)))
    assert texts.repetition(record("1", "a.png", "very very very very good")) == "one word four times in a row"
    assert texts.repetition(record("1", "a.png", "It is a dog.", "It is a dog.")) == "one answer to all 2 questions"
    assert texts.repetition(record("1", "a.png", "Yes.", "Yes.")) is None


def test_a_phrase_that_returns_in_a_long_answer_is_no_loop() -> None:
    """Three times four words are a third of 36: one word fewer around them is too much, many more are well."""
    phrase, words = "on the left side", [f"word{i}" for i in range(60)]

    def answer(n: int) -> str:
        around = words[: n - 12]
        return " ".join([phrase, *around[::2], phrase, *around[1::2], phrase])

    assert texts.repetition(record("1", "a.png", answer(35))) == "'on the left side' 3 times"
    assert texts.repetition(record("1", "a.png", answer(36))) is None


def test_another_language_must_be_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    said = record("1", "a.png", "Twenty letters and a few more.")
    for sure, want in ((0.89, None), (0.9, "fr with probability 0.90")):
        monkeypatch.setattr(texts, "detector", lambda sure=sure: lambda text: ("fr", sure))
        assert texts.language(said, "en") == want


def test_length_counts_the_words_of_all_answers() -> None:
    r = record("1", "a.png", "one two three", "four")
    assert texts.length(r, 4, 4) is None
    assert texts.length(r, 5, 9) == "4 words" == texts.length(r, 1, 3)


def test_one_answer_under_very_many_pictures_is_seen() -> None:
    same = [record(f"s{n}", f"{n}.png", "A photo of a porcupine.") for n in range(20)]
    others = [record(f"o{n}", f"{n}.png", f"A dog number {n}.") for n in range(1900)]
    assert set(texts.sameness(same + others)) == {r.id for r in same}  # 20 of 1,920 are more than 1 %
    assert texts.sameness(same[1:] + others) == {}  # nineteen are let through
    more = [record(f"m{n}", f"{n}.png", f"A cat number {n}.") for n in range(200)]
    assert texts.sameness(same + others + more) == {}  # 20 of 2,120 are less


def test_another_language_is_seen_and_short_texts_are_left_undecided() -> None:
    german = record("1", "a.png", "Ein Hund läuft über die grüne Wiese und bellt laut.")
    assert str(texts.language(german, "en")).startswith("de with probability")
    assert texts.language(german, "de") is None
    assert texts.language(record("1", "a.png", PLAIN[4]), "en") is None
    with pytest.raises(ValueError, match="fewer than 20 letters"):
        texts.language(record("1", "a.png", "Ja, ein Hund."), "en")


def test_colours_are_read_in_both_spellings() -> None:
    assert COLOURS.named("a grey or gray shape") == ["gray"]
