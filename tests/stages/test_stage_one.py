"""Stage 1 of a configuration from a ready corpus: nothing is annotated, its pictures are held against the test images, its costs are its own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tests import tiny_llava
from tests.stages.test_chain import config

from mllm_fl.errors import UserError
from mllm_fl.stages import chain, stage_one
from mllm_fl.stages.shared import corpus_path


def test_a_ready_corpus_takes_the_place_of_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tiny_llava.corpus(tmp_path / "ready")
    plain = config(annotate=False)
    assert plain.pretrain is not None
    c = dataclasses.replace(plain, pretrain=dataclasses.replace(plain.pretrain, corpus=str(ready)))
    monkeypatch.setattr(stage_one, "annotate", lambda *args, **more: pytest.fail("annotated"))
    final = chain.run(c, tmp_path / "runs")
    assert corpus_path(c, tmp_path) == ready and final["leaks"]["open/test"] == 0
    assert final["seconds"]["annotate"] == 0 and final["seconds"]["pretrain"] > 0
    test = chain.federation_of(c).test
    stored = next(iter(test.pairs([7])))[0]
    picture = next((ready / "images").iterdir())
    copy = tmp_path / "copy"
    shutil.copytree(ready, copy)
    Image.fromarray(stored.transpose(1, 2, 0).copy()).save(copy / "images" / picture.name)
    leaking = dataclasses.replace(c, pretrain=dataclasses.replace(plain.pretrain, corpus=str(copy)))
    with pytest.raises(
        UserError, match=r"1 images are also in the test set \(train/test: 0, align/test: 0, open/test: 1\)"
    ):
        chain.run(leaking, tmp_path / "runs")
