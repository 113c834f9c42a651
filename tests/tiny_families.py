"""A random model of each family that a compact model can be blended into, a few thousand parameters each, and a batch for it.

Configuration and inputs only: no tokenizer and no processor of the family's own, so that nothing has to be fetched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.families import FAMILIES
from mllm_fl.models.teacher.llava import LlavaTeacher

VOCABULARY, IMAGE = 50, 49
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip


def config_of(family: str) -> Any:
    """The family's configuration in small: 16 x 16 pixels, 4 x 4 patches of 8 channels."""
    bridge_torchvision()
    import transformers as t

    clip = {**SIGHT, "model_type": "clip_vision_model", "projection_dim": 8}
    siglip = {**SIGHT, "model_type": "siglip_vision_model", "vision_use_head": False}
    llama, gemma = {**TEXT, "model_type": "llama"}, {**TEXT, "head_dim": 8}
    shared: dict[str, Any] = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    if family == "llava":
        return t.LlavaConfig(vision_config=clip, text_config=llama, image_seq_length=16, **shared)
    if family == "llava-siglip":
        return t.LlavaConfig(
            vision_config=siglip, text_config=llama, vision_feature_select_strategy="full", vision_feature_layer=-1, **shared
        )  # fmt: skip
    if family == "vipllava":
        return t.VipLlavaConfig(vision_config=clip, text_config=llama, vision_feature_layers=[-2, -1], **shared)
    if family == "llava_next":
        return t.LlavaNextConfig(vision_config=clip, text_config=llama, image_grid_pinpoints=[[16, 32]], **shared)
    if family == "internvl":
        sight = {**SIGHT, "image_size": [16, 16], "patch_size": [4, 4]}
        return t.InternVLConfig(vision_config=sight, text_config={**TEXT, "model_type": "qwen2"}, image_seq_length=4, **shared)  # fmt: skip
    if family == "paligemma":
        return t.PaliGemmaConfig(
            vision_config=siglip, text_config={**gemma, "model_type": "gemma"}, projection_dim=16, image_token_id=IMAGE
        )  # fmt: skip
    if family == "gemma3":
        return t.Gemma3Config(vision_config=siglip, text_config=gemma, mm_tokens_per_image=4, image_token_id=IMAGE)
    if family in ("idefics3", "smolvlm"):
        cls = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        sight = dict(SIGHT)
        return cls(vision_config=sight, text_config=llama, scale_factor=2, **shared)
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        sight = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4, "window_size": 16,
            "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        config = t.Qwen2_5_VLConfig(vision_config=sight, text_config={**TEXT, "rope_parameters": rope}, **shared)
        config.mllm_fl_grid = 6  # 3 x 3 tokens: windows of 2 x 2 do not divide them
        return config
    raise KeyError(family)


def teacher_of(family: str, seed: int = 0) -> LlavaTeacher:
    """The frozen model with its place; ``family`` as in :data:`FAMILIES`, or "llava-siglip"."""
    config = config_of(family)
    import transformers as t

    laid_out = FAMILIES[config.model_type]
    laid_out.settle(config, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = t.AutoModelForImageTextToText.from_config(config)
        for name, p in model.named_parameters():
            if not p.any():  # Gemma 3's projection and others start at zero: nothing would flow
                torch.nn.init.normal_(p, 0.0, 0.1)
            elif "norm" not in name and p.dim() > 1:
                p.data.mul_(5)  # at the initial spread a change of the picture is lost in rounding
    place = laid_out.place(config)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return LlavaTeacher("tiny", config, processor, laid_out, place, model.eval().requires_grad_(False))


def inputs_of(teacher: LlavaTeacher, count: int, seed: int) -> dict[str, Tensor]:
    """Random pictures as the family's image encoder takes them."""
    draws, side = torch.Generator().manual_seed(seed), teacher.place.side
    kind = teacher.config.model_type
    if kind == "qwen2_5_vl":
        grid, channels = teacher.place.grid, 3 * 2 * 4 * 4
        return {
            "pixel_values": torch.randn(count * grid * grid, channels, generator=draws),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * count),
        }
    shape = (count, 3, side, side)
    if kind == "llava_next":
        shape = (count, 2, 3, side, side)  # type: ignore[assignment]
    if kind in ("idefics3", "smolvlm"):
        shape = (count, 1, 3, side, side)  # type: ignore[assignment]
    out = {"pixel_values": torch.randn(shape, generator=draws)}
    if kind == "llava_next":
        out["image_sizes"] = torch.tensor([[side, side]] * count)
    return out


def batch_of(teacher: LlavaTeacher) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels) of two conversations, the second one shorter and padded."""
    n = teacher.place.tokens
    ids = torch.tensor([[1] + [IMAGE] * n + [5, 6, 7, 8, 9, 2], [1] + [IMAGE] * n + [11, 12, 13, 2, 0, 0]])
    labels = torch.full_like(ids, -100)
    labels[0, n + 3 :] = ids[0, n + 3 :]
    labels[1, n + 2 : n + 5] = ids[1, n + 2 : n + 5]
    return ids, (ids != 0).long(), labels
