"""What others wrote comes in, what we write others read: every form, its faults, and the way back."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.annotate.corpora import HOSTILE, corpus, png, record

from mllm_fl.annotate import review
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.exports import FORMS, export, selected
from mllm_fl.annotate.imports import LEFT_OUT, import_corpus
from mllm_fl.annotate.quality.check import QualityConfig, check
from mllm_fl.annotate.records import load
from mllm_fl.annotate.truth import rows
from mllm_fl.errors import UserError


def entry(id: str, image: str | None, answer: str = "a dog .") -> dict[str, Any]:
    """A record as CC-595K has it."""
    said = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": id, **({"image": image} if image else {}), "conversations": said}


def chat(folder: Path, entries: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chat.json").write_text(json.dumps(entries))
    return folder / "chat.json"


def test_chat_json_and_a_zip(tmp_path: Path) -> None:
    source = chat(
        tmp_path / "in",
        [
            entry("1", "GCC_1.jpg"),
            entry("2", "GCC_2.jpg"),
            entry("3", "GCC_3.jpg"),
            entry("4", "GCC_4.jpg"),
            entry("5", None),
        ],
    )
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for name, content in (
            ("GCC_1.jpg", png(1)),
            ("deep/GCC_2.jpg", png(2)),
            ("GCC_3.jpg", png(1)),
            ("GCC_4.jpg", b"no picture"),
        ):
            z.writestr(name, content)
    found = import_corpus(str(source), tmp_path / "out", images=tmp_path / "images.zip")
    assert found.coverage == {"wanted": 4, "ok": 2, "dead": 0, "corrupt": 1, "duplicate": 1, "blocked": 0}
    c = Corpus.open(tmp_path / "out")
    assert [(r.id, r.image) for r in c.records] == [
        ("1", "images/GCC_1.jpg"),
        ("2", "images/GCC_2.jpg"),
        ("3", "images/GCC_1.jpg"),
    ]  # equal pictures are one
    assert c.card["coverage"]["corrupt"] == 1 and c.card["left_out"] == {
        "its picture is corrupt": 1,
        "it names no picture": 1,
    }
    left = rows(tmp_path / "out" / LEFT_OUT)
    assert [r["record"]["id"] for r in left] == ["4", "5"]  # nothing is lost
    with zipfile.ZipFile(tmp_path / "images.zip", "a") as z:
        z.writestr("new/GCC_4.jpg", png(4))
    assert (
        import_corpus(str(source), tmp_path / "out", images=tmp_path / "images.zip").records == 3
    )  # the broken one is still found first
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        z.writestr("GCC_4.jpg", png(4))
    again = import_corpus(str(source), tmp_path / "out", images=tmp_path / "images.zip")
    assert again.records == 4 and again.left_out == {
        "it names no picture": 1
    }  # only the missing one was looked for: the others are gone from the zip


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..\\b.jpg", "C:/b.jpg"])
def test_a_path_that_climbs_out_is_refused_before_anything_is_written(tmp_path: Path, path: str) -> None:
    source = chat(tmp_path / "in", [entry("1", "a.jpg"), entry("2", path)])
    with pytest.raises(UserError, match=r"chat.json: record 2: image path .* leaves the image folder") as e:
        import_corpus(str(source), tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_link_out_of_the_image_folder_is_blocked(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    source = chat(tmp_path / "in", [entry("1", "a.png")])
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret.png")
    found = import_corpus(str(source), tmp_path / "out")
    assert found.coverage["blocked"] == 1 and found.records == 0


def test_instruct_files_name_an_id_more_than_once(tmp_path: Path) -> None:
    source = chat(
        tmp_path / "in",
        [
            entry("17", "a.png"),
            entry("17", "a.png", "another"),
            entry("17-2", "a.png"),
            {"id": "x", "image": "a.png", "conversations": []},
            "text",
        ],
    )
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    found = import_corpus(str(source), tmp_path / "out")
    assert len({r.id for r in load(tmp_path / "out" / "records.json")}) == 3 == found.records
    assert sum(found.left_out.values()) == 2


def test_a_folder_of_pictures_with_what_lies_beside_them(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "in" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "sub" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "in/sub/0.txt").write_text("a dog")
    (tmp_path / "in/sub/1.json").write_text(json.dumps({"license": "CC0", "opt_out": True, "url": "http://x/1"}))
    (tmp_path / "in/sub/2.json").write_text(json.dumps({"status": "failed_to_download", "error_message": "timeout"}))
    found = import_corpus(str(tmp_path / "in"), tmp_path / "out", licence="MIT")
    assert (
        found.coverage == {"wanted": 3, "ok": 1, "dead": 1, "corrupt": 0, "duplicate": 0, "blocked": 1}
        and not (tmp_path / "out/records.json").exists()
    )
    known = {r["path"]: r for r in rows(tmp_path / "out" / "acquired.jsonl")}
    assert known["images/sub/0.png"]["licence"] == "MIT" and known["images/sub/1.png"]["licence"] == "CC0"
    assert rows(tmp_path / "out" / "truth.jsonl")[0]["truth"] == {"captions": ["a dog"]}
    assert import_corpus(str(tmp_path / "in"), tmp_path / "captions", captions=True).records == 1


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    records = [
        record(f"r{n}", f"images/{n % 3}.png", "A dog runs.", text, kind="conversation")
        for n, text in enumerate(("It is brown.", *HOSTILE, "Ünïcode – 犬."))
    ]
    return corpus(tmp_path / "ours", records)


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"corpus"}))
def test_every_form_comes_back_as_it_was(ours: Path, tmp_path: Path, form: str) -> None:
    before = Corpus.open(ours)
    found = export(before, tmp_path / "out", form, everything=True)
    assert (found.records, found.of) == (6, 6)
    source = {"llava": "out/chat.json", "jsonl": "out/records.jsonl"}.get(form, "out")
    import_corpus(str(tmp_path / source), tmp_path / "back")
    after = Corpus.open(tmp_path / "back")
    assert [(r.id, r.kind, r.turns) for r in after.records] == [(r.id, r.kind, r.turns) for r in before.records]
    assert [(tmp_path / "back" / r.image).read_bytes() for r in after.records] == [
        (ours / r.image).read_bytes() for r in before.records
    ]


def test_hugging_faces_own_library_reads_what_we_write(ours: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(Corpus.open(ours), tmp_path / "hf", "huggingface", everything=True)
    export(Corpus.open(ours), tmp_path / "wds", "webdataset", everything=True)
    table = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))["train"]
    assert (
        len(table) == 6 and table[1]["image"].size == (32, 32) and table[1]["conversations"][3]["value"] == HOSTILE[0]
    )
    streamed = datasets.load_dataset("webdataset", data_files=str(tmp_path / "wds" / "*.tar"), streaming=True)["train"]
    first = next(iter(streamed))
    assert first["png"].size == (32, 32) and first["json"]["id"] == "r0"
    table.save_to_disk(str(tmp_path / "disk"))
    assert import_corpus(str(tmp_path / "disk"), tmp_path / "back").records == 6


def members(path: Path) -> int:
    with tarfile.open(path) as tar:
        return len(tar.getnames())


def test_large_exports_are_cut_into_files(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_fl.annotate.exports.SHARD", 2 * len(png(0)))
    export(Corpus.open(ours), tmp_path / "wds", "webdataset", everything=True)
    export(Corpus.open(ours), tmp_path / "hf", "huggingface", everything=True)
    tars = sorted((tmp_path / "wds").glob("*.tar"))
    assert len(tars) > 1 and sum(map(members, tars)) == 12
    files = sorted((tmp_path / "hf/data").glob("*.parquet"))
    assert (
        len(files) > 1
        and files[0].name.endswith(f"-of-{len(files):05d}.parquet")
        and sum(pq.ParquetFile(f).metadata.num_rows for f in files) == 6
    )


def test_what_failed_or_was_dropped_stays_behind_and_is_counted(tmp_path: Path) -> None:
    records = [record("ok", "images/0.png", "A dog runs."), record("cut", "images/1.png", "The dog is next to the"), record("dropped", "images/2.png", "A cat sits."), record("rescued", "images/0.png", "The dog is on the"),
               record("new", "images/2.png", "A bird.")]  # fmt: skip
    folder = corpus(tmp_path / "c", records)
    check(folder, QualityConfig())
    r = review.Review(folder, records, 5)
    for id, decision, answers in (
        ("dropped", "drop", ()),
        ("rescued", "keep", ()),
        ("new", "relabel", ("A red bird.",)),
    ):
        r.decide(id, decision, answers)
    found = export(Corpus.open(folder), tmp_path / "out", "corpus")
    assert found.stayed == {"truncation": 1, "dropped in review": 1}
    out = Corpus.open(tmp_path / "out")
    assert {r.id: r.answers[0] for r in out.records} == {
        "ok": "A dog runs.",
        "rescued": "The dog is on the",
        "new": "A red bird.",
    }
    assert out.card["selected"] == {"from": "c", "records": 3, "of": 5} and "quality" not in out.card
    assert len(selected(Corpus.open(folder), everything=True)[0]) == 5


def test_bad_input_is_one_line_and_nothing_half_is_left(ours: Path, tmp_path: Path) -> None:
    c = Corpus.open(ours)
    for call, says in (
        (lambda: import_corpus(str(tmp_path / "no.json"), tmp_path / "x"), "is no file or folder that can be imported"),
        (lambda: import_corpus(str(chat(tmp_path / "e", [])), tmp_path / "x"), "holds no list of records"),
        (
            lambda: import_corpus(
                str(chat(tmp_path / "e", [entry("1", "a.png")])), tmp_path / "x", images=tmp_path / "nowhere"
            ),
            "give --images PATH",
        ),
        (lambda: import_corpus(str(ours), ours), "holds a corpus that was not imported"),
        (lambda: export(c, ours, "llava"), "is there already"),
        (lambda: export(c, tmp_path / "x", "zip"), "is no form of export"),
    ):
        with pytest.raises(UserError, match=says) as e:
            call()
        assert "\n" not in str(e.value)
    (ours / "images/2.png").unlink()
    with pytest.raises(UserError):
        export(c, tmp_path / "half", "llava", everything=True)
    assert not [p for p in tmp_path.iterdir() if "half" in p.name]


def test_a_read_only_disk_is_one_line(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    corpus = Corpus.open(ours)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"out: cannot be written \(Read-only file system\)"):
        export(corpus, tmp_path / "out", "llava", everything=True)


def test_a_place_that_is_no_folder_is_one_line(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export(Corpus.open(ours), tmp_path / "file" / "out", "llava", everything=True)
    with pytest.raises(UserError, match="cannot be written"):
        import_corpus(str(ours / "images"), tmp_path / "file" / "out")


@pytest.mark.data
def test_real_parquet_of_three_kinds(data_root: Path, tmp_path: Path) -> None:
    for name, kind, what in (("easy_vqa", "qa", 3), ("flickr8k", "captions", 5), ("cifar100", "labels", 1)):
        found = import_corpus(str(data_root / name), tmp_path / name, limit=4)
        assert found.coverage["ok"] == 4
        assert len(rows(tmp_path / name / "truth.jsonl")[0]["truth"][kind]) >= what


ODD = "a dog\u2028on\u2029the\u0085beach ."


def test_characters_that_end_lines_elsewhere_end_none_here(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{ODD[:10]}.png").write_bytes(png(1))
    (tmp_path / "in" / f"{ODD[:10]}.txt").write_text(ODD)
    for _ in range(2):  # the second reads what the first wrote
        found = import_corpus(str(tmp_path / "in"), tmp_path / "out", captions=True)
        assert found.records == 1
    c = Corpus.open(tmp_path / "out")
    assert c.records[0].answers == (ODD,)
    check(tmp_path / "out", QualityConfig(min_side=64))
    assert "size" in str(check(tmp_path / "out", QualityConfig(min_side=64)).records.failed["picture"])
    r = review.Review(tmp_path / "out", c.records, 1)
    r.decide(c.records[0].id, "relabel", [ODD + ODD])
    assert review.read(tmp_path / "out")[c.records[0].id].answers == (ODD + ODD,)
    export(c, tmp_path / "jsonl", "jsonl")
    assert import_corpus(str(tmp_path / "jsonl/records.jsonl"), tmp_path / "back").records == 1
    (tmp_path / "a.tsv").write_text(f"{ODD}\thttp://127.0.0.1:9/1.jpg\r\n")
    assert import_corpus(f"urls:{tmp_path / 'a.tsv'}", tmp_path / "urls").coverage["dead"] == 1


def test_half_characters_and_names_that_are_no_utf8(tmp_path: Path) -> None:
    source = chat(tmp_path / "in", [entry("1", "a.png", "half a smile \ud83d"), entry("2", "a.png")])
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    found = import_corpus(str(source), tmp_path / "out")
    assert found.records == 1 and found.left_out == {
        "holds half a character (a lone surrogate); write the text as UTF-8": 1
    }
    assert rows(tmp_path / "out" / LEFT_OUT)[0]["record"]["conversations"][1]["value"].endswith(
        "\ud83d"
    )  # kept as it came
    folder = tmp_path / "names"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9")
    (folder / f"{name}.png").write_bytes(png(2))
    (folder / f"{name}.json").write_text('{"caption": "half \\ud83d", "url": "http://x/\\ud83d"}')
    found = import_corpus(str(folder), tmp_path / "out2", captions=True)
    assert found.records == 1 and (tmp_path / "out2/images/caf_dce9.png").exists()
    assert Corpus.open(tmp_path / "out2").records[0].answers == ("half \ufffd",)


def test_unlabelled_rows_and_odd_cells_are_no_truth(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(4)]
    table = pa.table(
        {
            "image": cells,
            "label": [1, -1, 7, 0],
            "qa": [None, [{"question": "what?"}], [], [{"question": "is it a circle?", "answer": "yes"}]],
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "in/test.parquet")
    import_corpus(str(tmp_path / "in"), tmp_path / "out")
    known = {r["path"]: r["truth"].get("labels") for r in rows(tmp_path / "out/truth.jsonl")}
    assert known == {"images/test/0000000.png": ["dog"], "images/test/0000003.png": ["cat"]}
    (tmp_path / "words").mkdir()
    pq.write_table(pa.table({"image": ["a.png", "b.png"]}), tmp_path / "words/t.parquet")
    assert import_corpus(str(tmp_path / "words"), tmp_path / "out2").coverage["dead"] == 2


def test_a_damaged_member_of_a_zip_is_one_corrupt_picture(tmp_path: Path) -> None:
    source = chat(tmp_path / "in", [entry("1", "a.bmp"), entry("2", "b.png")])
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "BMP")
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.bmp", out.getvalue())
        z.writestr("b.png", png(1))
    whole = bytearray((tmp_path / "i.zip").read_bytes())
    start = 30 + len("a.bmp")
    whole[start : start + 4] = b"\xff\xff\xff\xff"  # no deflate stream begins so
    (tmp_path / "i.zip").write_bytes(whole)
    found = import_corpus(str(source), tmp_path / "out", images=tmp_path / "i.zip")
    assert (found.coverage["corrupt"], found.coverage["ok"], found.records) == (1, 1, 1)


def test_a_full_disk_is_not_told_as_a_broken_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = chat(tmp_path / "in", [entry("1", "a.png")])
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as z:
        z.writestr("a.png", png(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mllm_fl.annotate.imports.acquiring.acquire", full)
    with pytest.raises(OSError, match="No space left"):
        import_corpus(str(source), tmp_path / "out", images=tmp_path / "i.zip")
