"""What differs between families of vision-language models, where eq. (2) of MLLM-LLaVA-FL enters them (arXiv:2409.06067).

A family says which module is the projector W, what enters it for one picture (a grid of features, its width, how they are packed), how a
picture stands in the text, and how a question and an answer follow one another. Everything else is one code for all. A family stands in
:data:`FAMILIES` once three tests pass on a tiny random model: alpha = 0 is the plain loss exactly, alpha = 1 does not depend on the
teacher's pixels, gradients reach the compact model alone. What fails is in :data:`REFUSED`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_fl.errors import UserError


@dataclass(frozen=True)
class Place:
    """What enters the projector for one picture: ``grid`` x ``grid`` features of ``width`` channels, ``views`` times over.

    ``tokens``: how many image tokens stand in the text for it. ``side``: pixels a side of the square that the teacher is shown.
    """

    grid: int
    width: int
    tokens: int
    side: int
    views: int = 1


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is laid out; see the module's text.

    ``direct``: the language model receives W Z_v row by row and nothing else of the picture, so that Z_v alone is enough, and CLIP is not
    run at alpha = 1. ``finish``, of the others: (model, W Z_v as packed, configuration, place) -> what stands in each picture's tokens, and what else
    the model wants to know; CLIP is not run at alpha = 1 there either. ``listed``: its features travel as a list with an entry a picture. ``roles``: what stands before a question, between
    it and its answer, and after the answer (``{eos}``: the tokenizer's end token). ``settle``: makes configuration and processor see every
    picture as one square, where they would cut it into tiles.
    """

    place: Callable[[Any], Place]
    projector: str = "model.multi_modal_projector"
    direct: bool = True
    listed: bool = False
    roles: tuple[str, str, str] = ("USER: ", " ASSISTANT:", "{eos}")
    picture: Callable[[Any, int], str] = lambda processor, n: str(processor.image_token) * n
    settle: Callable[[Any, Any], None] = lambda config, processor: None
    pack: Callable[[Tensor, Any, Place], Tensor] = lambda tokens, config, place: tokens
    finish: Callable[[Any, Tensor, Any, Place], tuple[list[Tensor], dict[str, Tensor]]] | None = None
    types: str | None = None  # the model's name of a marking of tokens, see `marks`


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size if isinstance(size, int) else size[0])


def _patches(config: Any) -> int:
    patch = config.vision_config.patch_size
    return _side(config) // int(patch if isinstance(patch, int) else patch[0])


def _channels(config: Any, layers: Any) -> int:
    return int(config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers))


def _llava(config: Any) -> Place:
    """CLIP's class token goes first and is dropped by "default"; SigLIP has none, so that "full" keeps a square."""
    grid, has_class = _patches(config), config.vision_config.model_type in ("clip_vision_model", "clip")
    extra = int(has_class) - int(config.vision_feature_select_strategy == "default")
    return Place(grid, _channels(config, config.vision_feature_layer), grid * grid + extra, _side(config))


def _vipllava(config: Any) -> Place:
    grid = _patches(config)
    return Place(grid, _channels(config, config.vision_feature_layers), grid * grid, _side(config))


def _llava_next(config: Any) -> Place:
    """One tile: the picture whole, then the tile again with an end-of-line token a row."""
    one = _llava(config)
    return Place(one.grid, one.width, 2 * one.tokens + one.grid, one.side, views=2)


def _one_tile(config: Any, processor: Any) -> None:
    config.image_grid_pinpoints = [[_side(config), _side(config)]]
    if processor is not None:
        processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints


def _internvl(config: Any) -> Place:
    """Pixel shuffle stands before the projector: a quarter of the positions, four times the channels."""
    grid, ratio = int(_patches(config) * config.downsample_ratio), config.downsample_ratio
    return Place(grid, int(config.vision_config.hidden_size / ratio**2), grid * grid, _side(config))


def _paligemma(config: Any) -> Place:
    grid = _patches(config)
    return Place(grid, int(config.vision_config.hidden_size), grid * grid, _side(config))


def _gemma3(config: Any) -> Place:
    """The projector averages its grid down to ``mm_tokens_per_image`` positions."""
    return Place(
        _patches(config), int(config.vision_config.hidden_size), int(config.mm_tokens_per_image), _side(config)
    )


def _idefics3(config: Any) -> Place:
    """Pixel shuffle stands inside the connector."""
    grid, scale = _patches(config), int(config.scale_factor)
    return Place(grid, int(config.vision_config.hidden_size), (grid // scale) ** 2, _side(config))


QWEN_GRID = 24
"""Patches a side for Qwen2.5-VL, which takes pictures of any size: 336 pixels at its patch of 14, 12 x 12 tokens."""


def _qwen2_5(config: Any) -> Place:
    vision = config.vision_config
    grid, merge = int(getattr(config, "mllm_fl_grid", QWEN_GRID)), int(vision.spatial_merge_size)
    return Place(grid, int(vision.hidden_size), (grid // merge) ** 2, grid * int(vision.patch_size))


def _fixed_size(config: Any, processor: Any) -> None:
    if processor is not None:
        pixels = _qwen2_5(config).side ** 2
        processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        processor.image_processor.min_pixels = processor.image_processor.max_pixels = pixels


def qwen_order(config: Any, grid: int) -> Tensor:
    """Which position, row by row, stands at each place of Qwen2.5-VL's features: groups of merge x merge, then window by window.

    The windows are those of its vision tower, ``window_size`` pixels a side, the last ones cut off. Shape (grid * grid,).
    """
    vision = config.vision_config
    merge, rows = int(vision.spatial_merge_size), grid // int(vision.spatial_merge_size)
    groups = torch.arange(grid * grid).view(rows, merge, rows, merge).transpose(1, 2).reshape(rows, rows, merge * merge)
    window = int(vision.window_size) // merge // int(vision.patch_size)
    cut = [groups[r : r + window, c : c + window] for r in range(0, rows, window) for c in range(0, rows, window)]
    return torch.cat([w.reshape(-1) for w in cut])


def _qwen_pack(tokens: Tensor, config: Any, place: Place) -> Tensor:
    return tokens[:, qwen_order(config, place.grid).to(tokens.device)].flatten(0, 1)


def _two_views(tokens: Tensor, config: Any, place: Place) -> Tensor:
    return tokens.repeat_interleave(place.views, 0)


def _two_views_joined(model: Any, h: Tensor, config: Any, place: Place) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The picture, then its tile with an end-of-line token a row: by the model's own function."""
    each = list(h.unflatten(0, (-1, place.views)))
    size = torch.tensor([[place.side, place.side]] * len(each))
    how = config.vision_feature_select_strategy
    return model.model.pack_image_features(each, size, how, image_newline=model.model.image_newline)[0], {}


def _qwen_raster(model: Any, h: Tensor, config: Any, place: Place) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Groups back from window by window to row by row, as the tower does behind its merger."""
    merge, grid = int(config.vision_config.spatial_merge_size), place.grid
    corner = qwen_order(config, grid).view(-1, merge * merge)[:, 0]  # a position of each group
    group = corner // grid // merge * (grid // merge) + corner % grid // merge
    each = h.unflatten(0, (-1, place.tokens))[:, group.argsort().to(h.device)]
    return list(each), {"image_grid_thw": torch.tensor([[1, grid, grid]] * len(each), device=h.device)}


def _no_tiles(config: Any, processor: Any) -> None:
    for switch in ("crop_to_patches", "do_image_splitting", "do_pan_and_scan"):
        if processor is not None and hasattr(processor.image_processor, switch):
            setattr(processor.image_processor, switch, False)


def _exact_side(config: Any, processor: Any) -> None:
    """Idefics3 and SmolVLM resize to a size of the processor's own before they cut: here to the tower's."""
    _no_tiles(config, processor)
    if processor is not None:
        processor.image_processor.size = {"longest_edge": _side(config)}
        processor.image_processor.max_image_size = {"longest_edge": _side(config)}


def _framed(before: str, after: str) -> Callable[[Any, int], str]:
    """A picture between two of the processor's tokens, named by their attributes."""
    return lambda p, n: f"{getattr(p, before)}{p.image_token * n}{getattr(p, after)}"


def _gemma_picture(processor: Any, n: int) -> str:
    t = processor.tokenizer
    return f"\n\n{t.boi_token}{t.image_token * n}{t.eoi_token}\n\n"


def _idefics_picture(processor: Any, n: int) -> str:
    fake = str(getattr(processor, "fake_image_token", "<fake_token_around_image>"))
    tag = str(getattr(processor, "global_image_tag", getattr(processor, "global_image_token", "<global-img>")))
    token = processor.image_token if isinstance(processor.image_token, str) else processor.image_token.content
    return f"{fake}{tag}{token * n}{fake}"


_CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")
_IDEFICS = Family(
    _idefics3, "model.connector", listed=True, roles=("User:", "<end_of_utterance>\nAssistant:", "<end_of_utterance>\n"),
    picture=_idefics_picture, settle=_exact_side,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, listed=True),
    "vipllava": Family(_vipllava, roles=("###Human: ", "###Assistant:", "{eos}")),
    "llava_next": Family(_llava_next, direct=False, settle=_one_tile, pack=_two_views, finish=_two_views_joined),
    "internvl": Family(
        _internvl, roles=_CHATML, picture=_framed("start_image_token", "end_image_token"), settle=_no_tiles
    ),
    "paligemma": Family(
        _paligemma, roles=("", "\n", "{eos}"), types="prefix",
        picture=lambda p, n: f"{p.image_token * n}{p.tokenizer.bos_token}",
    ),
    "gemma3": Family(
        _gemma3, roles=("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"), types="pictures",
        picture=_gemma_picture, settle=_no_tiles,
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_5_vl": Family(
        _qwen2_5, "model.visual.merger", direct=False, roles=_CHATML, settle=_fixed_size, pack=_qwen_pack, finish=_qwen_raster, types="multimodal",
        picture=lambda p, n: f"<|vision_start|>{p.image_token * n}<|vision_end|>",
    ),
}  # fmt: skip
"""``model_type`` -> how it is laid out."""

_DEEPSTACK = "features of inner layers go round the projector (deepstack), so that alpha = 1 would still see the teacher's picture"
_CROSS = "its language model reads the picture by cross-attention, there is no projected sequence to blend"
REFUSED: dict[str, str] = {
    "qwen3_vl": _DEEPSTACK,
    "qwen3_vl_moe": _DEEPSTACK,
    "mllama": _CROSS,
    "idefics": _CROSS,
    "instructblip": "a Q-Former stands between the vision tower and the projector: its queries are no grid",
    "blip-2": "a Q-Former stands between the vision tower and the projector: its queries are no grid",
}
"""``model_type`` -> why it cannot be a teacher."""


def family_of(name: str, model_type: str) -> Family:
    """The family of a configuration.

    Raises:
        UserError: a family that leaks, has no grid, or was never tested; says which, and which are supported.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    why = f": {REFUSED[model_type]}" if model_type in REFUSED else ", it was not tested"
    raise UserError(
        name, f"a teacher of the family {model_type!r} is not supported{why}", f"supported: {', '.join(FAMILIES)}"
    )


def marks(kind: str | None, ids: Tensor, labels: Tensor, image_token: int) -> dict[str, Tensor]:
    """What a model wants to know about each token beside its id: which are pictures', which are the prefix that attends both ways.

    "pictures" (Gemma 3) and "multimodal" (Qwen2.5-VL): 1 at image tokens; "prefix" (PaliGemma): 0 up to the first answer, 1 from there on.
    """
    if kind is None:
        return {}
    if kind == "prefix":
        return {"token_type_ids": ((labels != -100).cumsum(1) > 0).long()}
    return {"mm_token_type_ids" if kind == "multimodal" else "token_type_ids": (ids == image_token).long()}
