"""A corpus with planted faults: each falls where it was planted, the funnel adds up, nothing is removed, and what was not looked at is said."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.annotate.corpora import corpus, png, record

from mllm_fl.annotate.quality import clipscore, probes, sheet
from mllm_fl.annotate.quality.check import QualityConfig, check, read
from mllm_fl.annotate.records import Record
from mllm_fl.errors import UserError

FINE = "A dog runs over the green grass."


def tiny(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 7)).save(out, "PNG")
    return out.getvalue()


def again(content: bytes) -> bytes:
    """The same picture, saved with losses."""
    out = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    test = tmp_path / "eval"
    for n, name in ((90, "train/a/0.png"), (91, "train/b/0.png"), (50, "test/a/0.png"), (51, "test/b/0.png")):
        (test / name).parent.mkdir(parents=True, exist_ok=True)
        (test / name).write_bytes(png(n))
    records: list[Record | dict[str, Any]] = [
        record("good", "images/0.png", FINE), record("broken", "images/1.png", FINE), record("small", "images/2.png", FINE), record("long", "images/3.png", FINE),
        record("copy", "images/4.png", FINE), record("near", "images/5.jpg", FINE), record("leak", "images/6.png", FINE), record("licence", "images/7.png", FINE),
        record("refusal", "images/0.png", "I'm sorry, I cannot see the image."), record("cut", "images/0.png", "The dog is standing next to the"),
        {"id": "bad", "image": "images/0.png", "conversations": [{"from": "human", "value": "no picture"}, {"from": "gpt", "value": "x"}]},
        record("cat", "images/0.png", "A cat sits on the green grass."),
    ]  # fmt: skip
    pictures = {
        "images/0.png": png(0), "images/1.png": png(1)[:40], "images/2.png": tiny(8, 8), "images/3.png": tiny(20, 200), "images/4.png": png(0), "images/5.jpg": again(png(0)),
        "images/6.png": png(50), "images/7.png": png(7),
    }  # fmt: skip
    folder = corpus(tmp_path / "corpus", records, pictures, {"images/0.png": {"captions": ["A dog on grass ."]}})
    facts = [
        {"image": f"images/{n}.png", "licence": "CC0" if n != 7 else "none of ours", "opt_out": False} for n in range(8)
    ]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    return folder


def test_everything_falls_where_it_was_planted_and_the_funnel_adds_up(planted: Path) -> None:
    before = {p.name: p.read_bytes() for p in planted.rglob("*") if p.is_file()}
    found = check(planted, QualityConfig(licences=("cc0",), evaluation=(f"folder:{planted.parent / 'eval'}",)))
    pictures = {i.rpartition("/")[2].partition(".")[0]: list(found.images.reasons(i)) for i in found.images.items}
    assert pictures == {
        "0": [], "1": ["decodable"], "2": ["size"], "3": ["size"], "4": ["duplicate"], "5": ["near_duplicate"], "6": ["evaluation"], "7": ["licence"],
    }  # fmt: skip
    said = {i: list(found.records.reasons(i)) for i in found.records.items if found.records.reasons(i)}
    assert said == {
        "broken": ["picture"], "small": ["picture"], "long": ["picture"], "copy": ["picture"], "near": ["picture"], "leak": ["picture"], "licence": ["picture"],
        "refusal": ["refusal"], "cut": ["truncation"], "#11": ["schema"], "cat": ["objects"],
    }  # fmt: skip
    for part in (found.images, found.records):
        assert sum(s.fell for s in part.funnel()) + len(part.kept()) == len(part.items)
        assert [s.reached for s in part.funnel()][1:] == [s.reached - s.fell for s in part.funnel()][:-1]
    assert found.records.kept() == ["good"]
    after = {p.name: p.read_bytes() for p in planted.rglob("*") if p.is_file()}
    assert {k: v for k, v in after.items() if k in before} == before  # nothing is removed
    assert set(after) - set(before) == {"quality.jsonl", "card.json"}


def test_what_nobody_looked_at_is_not_checked_with_its_reason(planted: Path) -> None:
    found = check(planted, QualityConfig())
    assert (
        found.images.status("evaluation", "images/6.png") == "not checked"
        and "--evaluation" in found.images.blind["evaluation"]
    )
    assert found.images.status("opt_out", "images/0.png") == "ok"
    assert found.images.status("opt_out", "images/5.jpg") == "not checked"
    assert found.images.status("size", "images/1.png") == "not checked"  # it cannot be decoded
    assert set(found.records.blind) == {"clip", "probes"}
    assert found.records.status("refusal", "#11") == "not checked" == found.records.status("objects", "licence")
    assert found.records.status("objects", "good") == "ok"


def test_findings_read_back_are_the_same_and_refuse_another_corpus(planted: Path) -> None:
    found = check(planted, QualityConfig())
    raw = read(planted)
    assert sheet.read(planted, raw.images, raw.ids) == (found.images, found.records)
    card = json.loads((planted / "card.json").read_text())
    assert card["quality"]["records"]["kept"] == len(found.records.kept()) and card["hallucination"][0]["false"] == 1
    with pytest.raises(UserError, match="another state of this corpus; run `mllm-fl corpus check` again"):
        sheet.read(planted, raw.images, raw.ids[:-1])


def test_a_card_keeps_what_others_wrote_there(planted: Path) -> None:
    (planted / "card.json").write_text('{"model": "m"}')
    check(planted, QualityConfig())
    assert json.loads((planted / "card.json").read_text())["model"] == "m"


def test_a_plug_in_looks_at_every_picture(planted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mychecks.py").write_text("def wide(p):\n    return f'{p.width} wide' if p.width > 30 else None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check(planted, QualityConfig(inspect=("nsfw=mychecks:wide",)))
    assert (
        found.images.failed["nsfw"]["images/0.png"] == "32 wide"
        and "nsfw" not in found.images.blind
        and "faces" in found.images.blind
    )
    with pytest.raises(UserError, match="--inspect nsfw=nowhere:f: cannot be imported"):
        check(planted, QualityConfig(inspect=("nsfw=nowhere:f",)))
    with pytest.raises(UserError, match=r"--inspect x: raised TypeError on images/\d.png: .*; mend the detector"):
        check(planted, QualityConfig(inspect=("x=os:getcwd",)))


def test_clip_scores_fall_by_percentile() -> None:
    values = {str(i): i / 100 for i in range(100)}
    edge, low = clipscore.lowest(values, 5)
    assert edge == pytest.approx(np.percentile(np.arange(100) / 100, 5)) and low == ["0", "1", "2", "3", "4"]
    assert clipscore.lowest({}, 5) == (0.0, []) and clipscore.lowest({"a": 1.0, "b": 1.0}, 50)[1] == []


def test_a_clip_score_is_two_and_a_half_times_the_cosine_and_never_below_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines of 0.6 and -0.5 in one record: (1.5 + 0) / 2."""
    vectors = {"It is so.": [0.6, 0.8], "It is not.": [-0.5, 0.75**0.5]}
    clip = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=16))),
        encode_images=lambda x: torch.tensor([[1.0, 0.0]] * len(x)),
        encode_texts=lambda said: torch.tensor([vectors[s] for s in said]),
    )
    monkeypatch.setattr(clipscore, "load_clip", lambda name: clip)
    records = [record("a", "images/0.png", "It is so."), record("b", "images/0.png", "It is so. It is not.")]
    folder = corpus(tmp_path, records, {"images/0.png": png(0)})
    assert clipscore.scores(folder, records, "any") == pytest.approx({"a": 1.5, "b": 0.75})


def test_clip_scores_come_from_the_bundled_clip(tmp_path: Path) -> None:
    """A rendered seven is nearer to what it is than to another character's name."""
    from mllm_fl.annotate.backends.base import png as encoded
    from mllm_fl.data.glyphs import glyph_set

    images, _ = glyph_set(("seven",), 8, 3)
    content = {f"images/{i}.png": encoded(images.read([i])[0]) for i in range(8)}
    records = [record(f"{i}-{w}", f"images/{i}.png", f"the {w}") for i in range(8) for w in ("digit seven", "letter m")]
    folder = corpus(tmp_path, records, content)
    found = clipscore.scores(folder, records, "mini")
    assert all(0 <= v <= 2.5 for v in found.values())
    assert sum(found[f"{i}-digit seven"] > found[f"{i}-letter m"] for i in range(8)) >= 7


PHOTOS = {
    f"{n}.png": {"captions": [f"A {a} and a {b} ."]}
    for n, (a, b) in enumerate((("dog", "ball"), ("cat", "ball"), ("horse", "ball"), ("dog", "tree")))
}


def test_probes_are_half_about_what_is_there_and_never_wrong() -> None:
    asked = probes.draw(PHOTOS, 200)
    assert asked == probes.draw(PHOTOS, 200)
    for p in asked:
        named = p.question.removeprefix("Is there ").partition(" in the")[0].split(" ", 1)[1]
        assert (named in PHOTOS[p.image]["captions"][0]) is p.expected
    assert sum(p.expected for p in asked) == 100
    of = {
        w: [p.question for p in probes.draw(PHOTOS, 6000) if p.way == w and p.image == "3.png"]
        for w in ("popular", "random")
    }
    share = {way: sum("ball" in q for q in questions) / len(questions) for way, questions in of.items()}
    assert share["popular"] == pytest.approx(
        3 / 5, abs=0.12
    )  # by how often each is seen elsewhere: ball 3, cat 1, horse 1
    assert share["random"] == pytest.approx(1 / 3, abs=0.12)


def test_adversarial_probes_name_what_is_most_often_seen_beside_what_is_there() -> None:
    """A fork lies beside a knife three times and beside a cup once; the frog, most frequent of all, never does."""
    beside = [["fork", "knife"]] * 3 + [["fork", "cup"]] + [["frog"]] * 9 + [["fork"]]
    truths = {f"{i}.png": {"labels": things} for i, things in enumerate(beside)}
    asked = [p for p in probes.draw(truths, 6000) if p.image == "13.png" and not p.expected]
    named = {w: {p.question.split()[3] for p in asked if p.way == w} for w in probes.WAYS}
    assert named["adversarial"] == {"knife"}
    assert named["random"] == {"knife", "cup", "frog"} >= named["popular"] > {"frog"}
    alone = [p.way for p in probes.draw(truths, 600) if p.image == "4.png" and not p.expected]
    assert set(alone) == {"popular", "random"}  # nothing was ever seen beside a frog


@pytest.mark.parametrize(
    ("says", "accuracy", "yes", "f1"), [("Yes.", 0.5, 1.0, 2 / 3), ("no", 0.5, 0.0, 0.0), ("a dog", 0.0, 0.0, 0.0)]
)
def test_one_that_always_says_the_same_is_seen_through(says: str, accuracy: float, yes: float, f1: float) -> None:
    (row,) = probes.measure(Path("."), PHOTOS, 100, lambda pairs: [says] * len(pairs))["kinds"]
    assert (row["accuracy"], row["yes"], row["f1"]) == pytest.approx((accuracy, yes, f1))
    assert row["no_answer"] == (100 if says == "a dog" else 0)


def test_a_record_falls_when_its_annotator_denies_what_it_named() -> None:
    def ask(pairs: Sequence[tuple[Path, str]]) -> list[str | None]:
        return ["No." if "cat" in question else "Yes." for _, question in pairs]

    records = [record("a", "0.png", "A cat."), record("b", "0.png", "A dog."), record("c", "0.png", "Nothing.")]
    denied, asked = probes.stand_by(Path("."), records, 10, ask)
    assert set(denied) == {"a"} and asked == {"a", "b"}


def test_damaged_findings_and_no_corpus_are_one_line(planted: Path, tmp_path: Path) -> None:
    (planted / "quality.jsonl").write_text('{"of": "images"')
    raw = read(planted)
    with pytest.raises(UserError, match=r"quality.jsonl: cannot be read"):
        sheet.read(planted, raw.images, raw.ids)
    with pytest.raises(UserError, match="no corpus here"):
        check(tmp_path / "nowhere", QualityConfig())
