"""The corpus as a stream: the same records and digests as when it is held whole, a little at a time, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests import tiny_llava

from mllm_fl.annotate.corpus import Corpus
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.llava import LlavaTeacher, load_llava
from mllm_fl.stages.pretraining import reading, samples
from mllm_fl.stages.pretraining.reading import digests, entries, records
from mllm_fl.stages.pretraining.samples import Stream, make_index, open_index


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LlavaTeacher:
    return load_llava(str(tiny_llava.save_tiny(tmp_path_factory.mktemp("llava"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def stream_of(teacher: LlavaTeacher, corpus: Path, folder: Path, pictures_only: bool = False) -> Stream:
    make_index(corpus, folder / "index.arrow", teacher, 512, "chat", not pictures_only)
    return Stream(
        open_index(corpus, folder / "index.arrow"), teacher, (12, 16), seed=0, pictures_only=pictures_only, max_tokens=512, form="chat"
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
def test_entries_come_out_whole_however_the_file_is_cut(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK", chunk)
    whole = json.loads((corpus / "records.json").read_text())
    assert list(entries(corpus / "records.json")) == whole[: len(whole)]
    assert len(whole) == 32


def test_streamed_records_and_digests_are_those_of_the_corpus(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    assert tuple(records(corpus)) == opened.records
    assert digests(corpus) == opened.digests()


def test_a_file_in_llavas_form_is_a_corpus_with_its_pictures_beside_it(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_bytes((corpus / "records.json").read_bytes())
    (tmp_path / "images").symlink_to(corpus / "images")
    with pytest.raises(UserError, match="leads out of the folder"):
        list(records(tmp_path / "chat.json"))
    (tmp_path / "images").unlink()
    (tmp_path / "images").mkdir()
    for picture in (corpus / "images").iterdir():
        (tmp_path / "images" / picture.name).write_bytes(picture.read_bytes())
    assert [r.id for r in records(tmp_path / "chat.json")] == [r.id for r in records(corpus)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "holds no record"),
        ("{}", "holds no JSON list of records"),
        ("", "holds no JSON list"),
        ('[{"id": "a"', r"cannot be read as JSON .*; restore it"),
        ('[{"id": "a", "image": "no.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}]', "image 'no.png' is missing"),
        ('[{"id": "a", "image": "../a.png", "conversations": []}]', "record 1: key 'conversations'"),
        ('["\\ud800', "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_corpus_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "records.json").write_text(text)
    with pytest.raises(UserError, match=says):
        list(records(tmp_path))


def test_an_id_twice_is_refused(corpus: Path, tmp_path: Path) -> None:
    entry = json.loads((corpus / "records.json").read_text())[0]
    (tmp_path / "images").mkdir()
    (tmp_path / entry["image"]).write_bytes((corpus / entry["image"]).read_bytes())
    (tmp_path / "records.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(UserError, match="record 2: id '0-caption' occurs twice"):
        list(records(tmp_path))


def test_the_index_knows_lengths_and_pictures(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    s = stream_of(teacher, corpus, tmp_path)
    assert (len(s), s.pictures) == (32, 16)
    some = [s.sample(i) for i in range(32)]
    assert s.predicted.tolist() == [x.predicted for x in some]
    assert s.index.column("tokens").tolist() == [len(x.ids) for x in some]
    assert s.picture_of.tolist() == [i // 2 for i in range(32)]
    only = stream_of(teacher, corpus, tmp_path, pictures_only=True)
    assert (len(only), only.picture_of.tolist()) == (16, list(range(16)))


def test_a_batch_brings_pictures_for_both_and_the_first_conversations(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    s = stream_of(teacher, corpus, tmp_path)
    batch = s.read(torch.tensor([5, 31, 0]), text=2, shown=True)
    whole = Corpus.open(corpus)
    assert torch.equal(batch.student, whole.pixels(12)[[2, 15, 0]])
    assert batch.shown is not None and torch.equal(batch.shown, whole.pixels(16)[[2, 15, 0]])
    assert [x.ids.tolist() for x in batch.samples] == [s.sample(5).ids.tolist(), s.sample(31).ids.tolist()]
    assert s.read(torch.tensor([1]), text=0, shown=False).shown is None


def test_decoded_pictures_are_kept_up_to_a_limit(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "KEEP", 3 * 3 * 12 * 12)
    s = stream_of(teacher, corpus, tmp_path)
    first = s.decoded(list(range(16)), 12)
    assert len(s._kept) == 3
    assert torch.equal(s.decoded(list(range(16)), 12), first)


def test_a_sample_that_trains_nothing_stops_the_reading(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 0-caption: nothing to predict: all 20 tokens are masked"):
        make_index(corpus, tmp_path / "index.arrow", teacher, 20, "chat")
    assert not (tmp_path / "index.arrow").exists()


def test_equal_conversations_are_put_into_tokens_once_and_only_the_latest_are_kept(
    teacher: LlavaTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def encode(plan: object, turns: list[tuple[str, str]], *_: object) -> object:
        asked.append(turns[0][1])
        return turns

    monkeypatch.setattr(samples, "encode", encode)
    monkeypatch.setattr(samples, "TEXTS", 2)
    written = samples.Written(teacher, 512, "chat")
    for answer in ("a", "b", "a", "c", "a", "b"):  # b is the one used longest ago when c comes
        written.of([("<image>", answer)], "here")
    assert asked == ["a", "b", "c", "b"]
