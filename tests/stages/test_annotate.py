"""Stage 1a: a corpus is made once, whatever happens on the way; and every bad input is one line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_fl.annotate.backends.base import Deliver, Request
from mllm_fl.annotate.corpus import Corpus
from mllm_fl.annotate.ledger import Entry
from mllm_fl.data.decode import to_rgb
from mllm_fl.errors import UserError
from mllm_fl.events import Event, silent
from mllm_fl.stages.annotate import AnnotateConfig, annotate

CONFIG = AnnotateConfig(images=7, kinds=("caption", "conversation"))


class Stub:
    """Answers with the question and the picture's mean; counts calls; may fail, die, or be silent at chosen ones."""

    model = "stub"

    def __init__(self, at: Callable[[int], str | None] = lambda n: None, batch_size: int = 3) -> None:
        self.at, self.batch_size, self.calls = at, batch_size, 0

    def parameters(self) -> dict[str, Any]:
        return {"stub": True}

    def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
        for i, r in enumerate(requests):
            self.calls += 1
            said = self.at(self.calls)
            if said == "die":
                raise KeyboardInterrupt
            entry = (
                Entry(error=said)
                if said
                else Entry(tuple(f"{q} {np.asarray(to_rgb(r.image)).mean():.1f}" for q in r.questions), None, 5, 3, 0.1)
            )
            deliver([(i, entry)])


def contents(folder: Path) -> dict[str, bytes]:
    names = ("records.json", "card.json", "scenes.jsonl", "annotate.json")
    return {n: (folder / n).read_bytes() for n in names} | {
        p.name: p.read_bytes() for p in (folder / "images").iterdir()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus made without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    annotate(CONFIG, folder, backend=Stub())
    return folder


def test_every_picture_gets_every_kind_and_the_card_counts_them(whole: Path) -> None:
    corpus = Corpus.open(whole)
    assert len(corpus.records) == 14
    assert len(corpus.images) == 7
    assert [r.kind for r in corpus.records[:2]] == ["caption", "conversation"]
    assert len(corpus.records[1].answers) == 3
    assert corpus.pixels().shape == (7, 3, 16, 16)
    assert corpus.card["kinds"]["caption"] | {"prompt": ""} == {
        "prompt": "", "ok": 7, "failed": 0, "prompt_tokens": 35, "completion_tokens": 21, "seconds": pytest.approx(0.7), "attempts": 7, "cost": None
    }  # fmt: skip
    assert len((whole / "scenes.jsonl").read_text().splitlines()) == 7


def test_a_finished_corpus_asks_nothing_again(whole: Path) -> None:
    idle = Stub()
    assert annotate(CONFIG, whole, backend=idle).records == Corpus.open(whole).records
    annotate(CONFIG, whole, backend=idle, retry=True)
    assert idle.calls == 0


@pytest.mark.parametrize("call", [1, 4, 9, 14])
def test_interrupted_at_any_call_it_ends_equal_and_repeats_only_the_call_in_flight(
    call: int, whole: Path, tmp_path: Path
) -> None:
    first, second = Stub(lambda n: "die" if n == call else None), Stub()
    with pytest.raises(KeyboardInterrupt):
        annotate(CONFIG, tmp_path, backend=first)
    assert not (tmp_path / "records.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open(tmp_path)
    annotate(CONFIG, tmp_path, backend=second)
    assert first.calls + second.calls == 14 + 1
    assert contents(tmp_path) == contents(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.stages.test_annotate import CONFIG, Stub
from mllm_fl.stages.annotate import annotate
point = sys.argv[2]
if point.isdigit():
    stub = Stub(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == int(point) else None)
else:
    stub, real = Stub(), os.fsync
    whole = os.replace
    def replace(a, b):
        if Path(b).name == point: os.kill(os.getpid(), signal.SIGKILL)
        return whole(a, b)
    os.replace = replace
annotate(CONFIG, Path(sys.argv[1]), backend=stub)
"""


@pytest.mark.parametrize("point", ["8", "card.json", "records.json"])
def test_killed_it_resumes_to_the_same_bytes(point: str, whole: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), point], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -signal.SIGKILL
    stub = Stub()
    annotate(CONFIG, tmp_path, backend=stub)
    assert stub.calls == (14 - 7 if point == "8" else 0)
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.rglob(".*.tmp*"))


def test_failures_are_counted_not_served_and_asked_again_on_request(tmp_path: Path) -> None:
    corpus = annotate(CONFIG, tmp_path, backend=Stub(lambda n: "refused" if n in (2, 5) else None))
    assert len(corpus.records) == 12
    assert corpus.card["failures"] == {"refused": 2}
    assert annotate(CONFIG, tmp_path, backend=Stub()).records == corpus.records  # a finished corpus stays as it is
    mended = annotate(CONFIG, tmp_path, backend=Stub(), retry=True)
    assert len(mended.records) == 14
    assert mended.card["failures"] == {}
    assert sum(k["attempts"] for k in mended.card["kinds"].values()) == 16


def test_empty_answers_and_image_tokens_in_answers_are_failures(tmp_path: Path) -> None:
    class Odd(Stub):
        def answer(self, requests: Iterable[Request], deliver: Deliver) -> None:
            deliver([(i, Entry(("  ", "<image>", "fine")[i % 3 : i % 3 + 1])) for i, _ in enumerate(requests)])

    corpus = annotate(replace(CONFIG, images=3, kinds=("caption",)), tmp_path, backend=Odd())
    assert [r.answers for r in corpus.records] == [("fine",)]
    assert corpus.card["failures"] == {"empty answer": 1, "answer contains <image>": 1}


SHARING = """
import sys, time
from pathlib import Path
from tests.stages.test_annotate import CONFIG, Stub
from mllm_fl.stages.annotate import annotate
stub = Stub(lambda n: time.sleep(0.05), batch_size=2)
while not Path(sys.argv[2]).exists(): time.sleep(0.01)
annotate(CONFIG, Path(sys.argv[1]), backend=stub)
print(stub.calls)
"""


def test_two_processes_share_the_work(whole: Path, tmp_path: Path) -> None:
    folder, go = tmp_path / "corpus", tmp_path / "go"
    command = [sys.executable, "-c", SHARING, str(folder), str(go)]
    both = [
        subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    go.touch()
    calls = [int(p.communicate()[0]) for p in both]
    assert sum(calls) == 14
    assert contents(folder)["records.json"] == contents(whole)["records.json"]


def test_nothing_answered_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one of 14 annotations succeeded; the first failed with: HTTP 400"):
        annotate(CONFIG, tmp_path, backend=Stub(lambda n: "HTTP 400"))


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    seen: list[Event] = []
    annotate(CONFIG, tmp_path, seen.append, backend=Stub())
    assert (seen[-1].stage, seen[-1].done, seen[-1].total) == ("annotate", 14, 14)


def test_a_folder_of_images_is_annotated_and_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    (source / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.jpg", "deep/same-as-a.png")):
        Image.fromarray(np.full((20, 30, 3), 80 * (i % 2), np.uint8)).save(source / name)
    (source / "broken.png").write_bytes(b"\x89PNG no more")
    config = AnnotateConfig(source=f"folder:{source}", kinds=("caption",), backend="stub", image_size=None)
    stub = Stub()
    corpus = annotate(config, tmp_path / "corpus", backend=stub)
    assert len(corpus.records) == 3
    assert stub.calls == 2  # equal pictures are asked about once
    assert list(corpus.card["unreadable"]) == ["broken.png"]
    assert corpus.card["agreement"] == "not checked: no scene records"


def test_a_corpus_of_another_annotator_or_other_pictures_is_not_handed_out(tmp_path: Path) -> None:
    """Finished or not, records.json counts only for what made it: the model, the prompts' versions, the source's files."""
    source, folder = tmp_path / "photos", tmp_path / "corpus"
    source.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 80 * i, np.uint8)).save(source / f"{i}.png")
    config = AnnotateConfig(source=f"folder:{source}", kinds=("caption",), backend="stub")
    annotate(config, folder, backend=Stub())

    class Other(Stub):
        model = "stub of another day"

    with pytest.raises(UserError, match=r"made\.model \(stub -> stub of another day\); use another folder"):
        annotate(config, folder, backend=Other())
    begun = json.loads((folder / "annotate.json").read_text())
    (folder / "annotate.json").write_text(json.dumps(begun | {"made": begun["made"] | {"prompts": {"caption": "v0"}}}))
    with pytest.raises(UserError, match=r"made\.prompts\.caption \(v0 -> "):
        annotate(config, folder, backend=Stub())
    (folder / "annotate.json").write_text(json.dumps(begun))
    Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(source / "2.png")
    with pytest.raises(UserError, match=r"begun with another configuration: made\.pictures \("):
        annotate(config, folder, backend=Stub())
    shutil.rmtree(source)  # what is not there any more is not compared: the corpus holds its pictures
    assert len(annotate(config, folder, backend=Stub()).records) == 3
    (folder / "annotate.json").unlink()
    with pytest.raises(UserError, match=r"not annotated here \(no annotate\.json\)"):
        annotate(config, folder, backend=Stub())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": 0}, r"annotate\.images: 0 is below 1"),
        ({"kinds": ("poem",)}, r"annotate\.kinds: unknown kind 'poem'; choose from caption"),
        ({"source": "internet"}, r"annotate\.source: unknown source"),
        ({"backend": "openai"}, r"annotate\.model: is not set"),
        ({"base_url": "localhost:8000"}, r"annotate\.base_url: .*no http"),
        ({"image_size": 2}, r"annotate\.image_size: 2 is outside"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)


def test_missing_sources_and_other_configurations_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        annotate(replace(CONFIG, source=f"folder:{tmp_path}/absent"), tmp_path / "c", backend=Stub())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image"):
        annotate(replace(CONFIG, source=f"folder:{tmp_path}/empty"), tmp_path / "c", backend=Stub())
    with pytest.raises(UserError, match=r"begun with another configuration: images \(7 -> 8\)"):
        annotate(replace(CONFIG, images=8), whole, silent, backend=Stub())


def test_a_damaged_corpus_is_refused_by_its_record(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        Corpus.open(tmp_path)
    annotate(CONFIG, tmp_path, backend=Stub())
    first = Corpus.open(tmp_path).images[0]
    picture = (tmp_path / first).read_bytes()
    (tmp_path / first).write_bytes(picture[:40])
    with pytest.raises(UserError, match=first):
        Corpus.open(tmp_path).pixels()
    (tmp_path / first).unlink()
    with pytest.raises(UserError, match=f"record 1: image '{first}' is missing"):
        Corpus.open(tmp_path)
    (tmp_path / first).symlink_to(whole / first)
    with pytest.raises(UserError, match="leads out of the folder"):
        Corpus.open(tmp_path)
    (tmp_path / "records.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="holds no record"):
        Corpus.open(tmp_path)
