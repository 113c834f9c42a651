"""A random LLaVA of a few thousand parameters in Hugging Face's layout, and a corpus of sixteen glyphs with true annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mllm_fl.annotate.backends.base import png
from mllm_fl.annotate.records import Record, Turn, save
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.questions import QUESTIONS, answer
from mllm_fl.models.teacher.words import make_tokenizer

SIZE, PATCH, WIDTH = 16, 4, 8


def build(seed: int = 0, **overrides: Any) -> Any:
    """A LlavaForConditionalGeneration with random weights: 16 x 16 pixels, 4 x 4 features of 8 channels."""
    bridge_torchvision()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = make_tokenizer(append=False)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def save_tiny(folder: Path, *, patch: int = PATCH, **overrides: Any) -> Path:
    """The model and its processor in a folder; ``patch`` is what the processor believes."""
    bridge_torchvision()
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = LlavaProcessor(
        image_processor=images, tokenizer=make_tokenizer(append=False), patch_size=patch, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    build(**overrides).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def corpus(folder: Path, count: int = 16) -> Path:
    """A corpus folder whose annotations are the truth: per glyph a caption and a conversation of two turns."""
    images, scenes = render_glyphs(count, 5, image_size=SIZE)
    records = []
    (folder / "images").mkdir(parents=True)
    for i, scene in enumerate(scenes):
        (folder / f"images/{i}.png").write_bytes(png(images.read([i])[0]))
        for kind, asked in (("caption", QUESTIONS["caption"][:1]), ("conversation", QUESTIONS["conversation"][:2])):
            turns: list[Turn] = []
            for q in asked:
                turns += [Turn("human", ("" if turns else "<image>\n") + q), Turn("gpt", answer(scene, q))]
            records.append(Record(f"{i}-{kind}", f"images/{i}.png", tuple(turns), kind))
    save(records, folder / "records.json")
    (folder / "card.json").write_text(json.dumps({"source": "test"}))
    return folder
