"""Teachers from folders in the layout of the real ones: weights in several safetensors files with an index, processor files beside; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_llava
from tests.tiny_families import config_of

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.models.teacher.blend import lm_loss
from mllm_fl.models.teacher.conversation import collate, encode
from mllm_fl.models.teacher.llava import load_llava, open_llava
from mllm_fl.models.teacher.located import fingerprint
from mllm_fl.models.teacher.words import make_tokenizer

TURNS = [("<image>\nwhich character is this ?", "it is the digit three .")]


def sharded(folder: Path) -> list[Path]:
    """The tiny LLaVA, its weights cut into files of 8 kB."""
    tiny_llava.save_tiny(folder)
    (folder / "model.safetensors").unlink()
    tiny_llava.build().save_pretrained(folder, max_shard_size="8KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_weights_in_several_files_are_the_weights_in_one(tmp_path: Path) -> None:
    shards = sharded(tmp_path / "cut")
    assert len(shards) > 3 and (tmp_path / "cut/model.safetensors.index.json").exists()
    whole = load_llava(str(tiny_llava.save_tiny(tmp_path / "whole")))
    cut = load_llava(str(tmp_path / "cut"))
    a, b = whole.model.state_dict(), cut.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    half = load_llava(str(tmp_path / "cut"), dtype=torch.bfloat16)
    assert half.projector_dtype == torch.bfloat16
    before = fingerprint(str(tmp_path / "cut"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(str(tmp_path / "cut")) != before  # every file counts


def test_a_missing_file_of_weights_is_one_line(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    shards[2].unlink()
    assert open_llava(str(tmp_path)).grid == 4  # geometry needs no weights
    with pytest.raises(
        UserError, match=rf"{tmp_path}: cannot be loaded as a LLaVA \(.*{shards[2].name}.*\); give a complete"
    ):
        load_llava(str(tmp_path))


def test_weights_that_are_no_safetensors_are_not_read(tmp_path: Path) -> None:
    tiny_llava.save_tiny(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a LLaVA"):
        load_llava(str(tmp_path))


def saved(family: str, folder: Path) -> Path:
    """A random model of a family with a processor of its own class."""
    bridge_torchvision()
    import transformers as t

    tokenizer, config = make_tokenizer(append=False), config_of(family)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    side: dict[str, Any] = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": False}  # fmt: skip
    cut: dict[str, Any] = {"patch_size": 4, "vision_feature_select_strategy": "default", "image_token": "<image>", "num_additional_image_tokens": 1}  # fmt: skip
    if family == "llava_next":
        images = t.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 32]]
        )
        processor: Any = t.LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, **cut)
    else:
        processor = t.LlavaProcessor(image_processor=t.CLIPImageProcessorPil(**side), tokenizer=tokenizer, **cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    saying = json.loads((folder / "config.json").read_text())
    assert saying["model_type"] == family
    return folder


@pytest.mark.parametrize(
    ("family", "tokens"), [("vipllava", 16), ("llava_next", 36)]
)  # 16 + 16 + an end of line for each of 4 rows
def test_a_family_from_its_own_files(tmp_path: Path, family: str, tokens: int) -> None:
    teacher = load_llava(str(saved(family, tmp_path)))
    assert (teacher.grid, teacher.place.tokens) == (4, tokens)
    ids, mask, labels = collate([encode(teacher, TURNS, 512, "here")] * 2, 0)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=teacher.width), 10, 0)
    student = net.tokens(x.float() / 255, teacher.grid)
    z = teacher.features(x)
    assert z.shape == teacher.family.pack(student, teacher.config, teacher.place).shape
    plain = teacher.model(input_ids=ids, attention_mask=mask, labels=labels, **teacher.pictures(x)).loss
    torch.testing.assert_close(lm_loss(teacher, ids, mask, labels, student, 0.0, z, images=x), plain, rtol=1e-5, atol=0)
    other = lm_loss(teacher, ids, mask, labels, student, 1.0, images=255 - x)
    assert torch.equal(lm_loss(teacher, ids, mask, labels, student, 1.0, images=x), other)


def test_the_plain_form_is_picture_and_caption_and_the_chat_form_is_the_familys(tmp_path: Path) -> None:
    plan = open_llava(str(saved("vipllava", tmp_path)))
    words = plan.processor.tokenizer
    said = encode(plan, TURNS, 512, "here", "plain")
    rest = said.ids[said.ids != plan.image_token]
    assert words.decode(rest) == "<bos> it is the digit three . <eos>"
    assert said.predicted == 7 and int((said.ids == plan.image_token).sum()) == 16
    chat = encode(plan, TURNS, 512, "here")  # ###Human: <image> question###Assistant: answer
    assert (
        chat.predicted == 7 and len(chat.ids) > len(said.ids) + len(words("which character is this ?")["input_ids"]) - 1
    )
