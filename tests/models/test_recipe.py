"""The recipe of the bundled teachers, run small: it trains, and what it saves loads through the same doors as the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_fl.data.glyphs import DIGITS, LETTERS, render_glyphs
from mllm_fl.errors import UserError
from mllm_fl.models.teacher import recipe
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.conversation import encode
from mllm_fl.models.teacher.llava import load_llava
from mllm_fl.models.teacher.questions import QUESTIONS, answer, vocabulary
from mllm_fl.models.teacher.words import SPECIAL, make_tokenizer


def test_recipe_trains_and_its_files_load(tmp_path: Path) -> None:
    recipe.main(["--out", str(tmp_path), "--glyphs", "300", "--clip-steps", "3", "--llava-steps", "2"])
    torch.set_num_threads(1)
    clip = load_clip(str(tmp_path / "mini-clip"))
    llava = load_llava(str(tmp_path / "mini-llava"))
    assert (llava.grid, llava.width) == (4, 128)
    mine = clip.model.vision_model.state_dict()
    theirs = {k.removeprefix("vision_model."): v for k, v in llava.model.model.vision_tower.state_dict().items()}
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[k], theirs[k]) for k in mine
    )  # the tower is mini-CLIP's
    assert all("seed 0" in (tmp_path / f"TRAINING-{part}.log").read_text() for part in ("clip", "llava"))
    assert not list(tmp_path.glob("*.new"))


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file/out: cannot be written .*; name another folder"):
        recipe.main(["--out", str(tmp_path / "file" / "out")])


def test_every_word_of_every_answer_is_in_the_vocabulary() -> None:
    words = {*SPECIAL, *vocabulary()}
    _, scenes = render_glyphs(300, seed=5, characters=DIGITS + LETTERS)
    for scene in scenes:
        for kind, questions in QUESTIONS.items():
            for q in questions:
                unknown = [w for w in (q + " " + answer(scene, q)).split() if w not in words]
                assert not unknown, (kind, unknown)


def test_end_token_is_not_the_one_that_clip_reads_as_legacy() -> None:
    assert make_tokenizer(append=True).eos_token_id == 3


def test_trained_conversations_have_the_form_that_pretraining_uses() -> None:
    """What mini-LLaVA was taught and what stage 1b feeds it are the same tokens with the same targets."""
    teacher = load_llava("mini")
    _, scenes = render_glyphs(1, seed=5)
    turns = recipe.questions_of(scenes[0], "conversation", 0)
    ids, labels = recipe.conversation_ids(teacher.processor.tokenizer, turns, teacher.grid**2)
    first = (f"<image>\n{turns[0][0]}", turns[0][1])
    sample = encode(teacher, [first, *turns[1:]], 512, "here")
    assert sample.ids.tolist() == ids
    assert sample.labels.tolist() == labels
