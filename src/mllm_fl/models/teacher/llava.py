"""A vision-language model as a frozen teacher: CLIP g, projector W, language model; H_v = W Z_v (MLLM-LLaVA-FL, arXiv:2409.06067, eq. 1).

LLaVA-1.5 is the paper's; what other families do otherwise is in :mod:`mllm_fl.models.teacher.families`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.families import Family, Place, family_of
from mllm_fl.models.teacher.located import fingerprint, locate

INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
"""What a model's image encoder may ask for, of all that its image processor returns."""


@dataclass(frozen=True)
class Blueprint:
    """A teacher without its weights: enough to write its conversations, and to say what does not fit."""

    name: str
    config: Any
    processor: Any
    family: Family
    place: Place

    @property
    def grid(self) -> int:
        """Positions a side of the features that enter the projector."""
        return self.place.grid

    @property
    def width(self) -> int:
        """Channels of these features."""
        return self.place.width

    @property
    def image_token(self) -> int:
        """The id that stands ``place.tokens`` times in the text, where the picture's features go."""
        return int(self.config.image_token_id)

    @property
    def placeholder(self) -> str:
        """The image token as text."""
        token = getattr(self.processor, "image_token", "<image>")
        return token if isinstance(token, str) else str(token.content)

    @property
    def picture(self) -> str:
        """A picture as it stands in the text."""
        return self.family.picture(self.processor, self.place.tokens)

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The frozen model with weights of no value; for where tensors have no storage (FakeTensorMode)."""
        from transformers import AutoModelForImageTextToText
        from transformers.initialization import no_init_weights

        with no_init_weights():  # some initialisers look at the values that they drew
            model: nn.Module = AutoModelForImageTextToText.from_config(self.config, dtype=dtype)
        model.tie_weights()  # type: ignore[operator]  # or shared ones would count twice
        return model.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str | None:
        """See :func:`fingerprint`; of the files that this teacher is loaded from."""
        return fingerprint(self.name)


@dataclass(frozen=True)
class LlavaTeacher(Blueprint):
    """A frozen vision-language model. ``place.grid`` squared features of ``place.width`` channels enter the projector for each picture."""

    model: Any

    @property
    def projector(self) -> nn.Module:
        """The module W whose input is blended."""
        found: nn.Module = self.model.get_submodule(self.family.projector)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.projector.parameters()).device

    @property
    def projector_dtype(self) -> torch.dtype:
        """In which precision the frozen weights are kept."""
        return next(self.projector.parameters()).dtype

    @property
    def takes_features(self) -> bool:
        """Whether the model accepts projected features in the place of pictures (transformers 5.18 and later)."""
        return "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters

    @property
    def blind(self) -> bool:
        """Whether the loss at alpha = 1 is computed without the picture, and CLIP is not run."""
        if self.takes_features:
            return self.family.direct or self.family.finish is not None
        return self.family.direct and self.config.model_type == "llava"

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's own view of square pictures uint8 (n, 3, h, h): what its image encoder takes, by name."""
        arrays: list[Any] = list(images.permute(0, 2, 3, 1).contiguous().numpy())
        if self.family.projector == "model.connector":
            arrays = [[a] for a in arrays]  # a list of pictures a conversation
        out = self.processor.image_processor(arrays, return_tensors="pt", input_data_format="channels_last")
        return {k: out[k].to(self.device) for k in INPUTS if k in out}

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """g(X): what CLIP hands to the projector for square pictures uint8 (n, 3, h, h). Shape (n, grid * grid, width), packed as its family packs."""
        seen: list[Tensor] = []
        handle = self.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            for part in torch.split(images, batch_size):
                self.model.get_image_features(**self.pictures(part))
        finally:
            handle.remove()
        return torch.cat(seen)

    def embeddings(self, ids: Tensor, z: Tensor) -> Tensor:
        """The language model's input: text ids (n, t) embedded, H_v = W Z_v in the picture's places. Shape (n, t, d)."""
        text: Tensor = self.model.get_input_embeddings()(ids)
        h: Tensor = self.projector(z)  # eq. (1)
        there = (ids == self.image_token).unsqueeze(-1).expand_as(text)
        return text.masked_scatter(there, h.to(text.dtype))


def open_llava(name: str = "mini", expect_width: int | None = None) -> Blueprint:
    """A teacher's configuration and processor by the name "mini", a local folder, or a hub id, checked; its weights are not read.

    ``expect_width``: the adapter width of the compact model, checked as well.

    Raises:
        UserError: nothing there, a family that cannot be blended into (with the reason), image tokens != features, adapter width !=
            projector width (names both numbers).
    """
    bridge_torchvision()
    from transformers import AutoConfig, AutoProcessor

    where = locate(name)
    with quiet(), _complaining(name):
        config = AutoConfig.from_pretrained(where)
        family = family_of(name, str(config.model_type))
        processor = AutoProcessor.from_pretrained(where, backend="pil")  # the same pixels with and without torchvision
        family.settle(config, processor)
        plan = Blueprint(name, config, processor, family, family.place(config))
        _check_tokens(plan)
    if expect_width is not None and expect_width != plan.width:
        raise UserError(
            "model.adapter_dim",
            f"is {expect_width}, but the projector of {name!r} takes {plan.width} channels",
            f"set it to {plan.width}",
        )
    return plan


def load_llava(
    name: str = "mini",
    expect_width: int | None = None,
    *,
    plan: Blueprint | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LlavaTeacher:
    """The teacher with its weights; in evaluation mode, nothing trainable. ``plan``: what :func:`open_llava` gave, if it was asked before.

    Weights are read from safetensors, in one file or in several, straight to ``device``.

    Raises:
        UserError: as :func:`open_llava`, and weights that are missing or do not fit.
    """
    plan = plan or open_llava(name, expect_width)
    from transformers import AutoModelForImageTextToText

    with quiet(), _complaining(name):
        model = AutoModelForImageTextToText.from_pretrained(
            locate(name), config=plan.config, dtype=dtype, use_safetensors=True
        )
    model = model.to(device).eval().requires_grad_(False)
    return LlavaTeacher(plan.name, plan.config, plan.processor, plan.family, plan.place, model)


def compute_twice(model: Any) -> None:
    """Gradient checkpointing without training mode: only the layers' own flags are set, so that no dropout wakes up."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for m in model.modules():
        if isinstance(m, GradientCheckpointingLayer):
            m.training = True


@contextmanager
def _complaining(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as e:
        first = " ".join(str(e).split())[:200]
        raise UserError(
            name,
            f"cannot be loaded as a LLaVA ({first})",
            "give a complete Hugging Face folder, or a hub id and network",
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers draws no progress bars of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_tokens(plan: Blueprint) -> None:
    """Image tokens = features = what stands in our text, or both numbers in one line."""
    from PIL import Image

    side, processor, place = plan.place.side, plan.processor, plan.place
    if "full" in str(getattr(plan.config, "vision_feature_select_strategy", "")) and place.tokens != place.grid**2:
        raise UserError(
            plan.name,
            f"its {place.tokens} features are no square grid (the class token is kept)",
            'use vision_feature_select_strategy = "default"',
        )
    blank = Image.new("RGB", (side, side))
    ids = processor(text=plan.placeholder, images=blank)["input_ids"]
    written = sum(int(i) == plan.image_token for i in (ids[0] if isinstance(ids[0], list) else ids))
    if written != place.tokens:
        raise UserError(
            plan.name,
            f"its processor writes {written} image tokens, but its vision tower gives {place.tokens} features",
            "patch_size, num_additional_image_tokens and vision_feature_select_strategy of the processor must fit the model",
        )
    ours = processor.tokenizer(plan.picture, add_special_tokens=False)["input_ids"]
    if ours.count(plan.image_token) != place.tokens:
        raise UserError(
            plan.name,
            f"its tokenizer reads {ours.count(plan.image_token)} image tokens in a text that holds {place.tokens}",
            "the image token must be one of the tokenizer's special tokens",
        )
