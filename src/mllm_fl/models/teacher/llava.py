"""LLaVA as a frozen teacher: CLIP g, projector W, language model; H_v = W Z_v (MLLM-LLaVA-FL, arXiv:2409.06067, eq. 1).

Everything that depends on the family of the model (where the projector sits, how many features a picture gives) is in this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision

BUNDLED = Path(__file__).parent / "bundled"
PROJECTOR = {"llava": "model.multi_modal_projector"}
"""Family (``model_type``) -> path of the module whose input is Z_v. A family stands here once its tests pass."""


@dataclass(frozen=True)
class LlavaTeacher:
    """A frozen LLaVA. ``grid`` x ``grid`` features of ``width`` channels enter the projector for each picture."""

    name: str
    model: Any
    processor: Any
    grid: int
    width: int

    @cached_property
    def fingerprint(self) -> str | None:
        """See :func:`fingerprint`; of the files that this teacher was loaded from."""
        return fingerprint(self.name)

    @property
    def projector(self) -> nn.Module:
        """The module W whose input is blended."""
        found: nn.Module = self.model.get_submodule(PROJECTOR[self.model.config.model_type])
        return found

    @property
    def image_token(self) -> int:
        """The id that stands ``grid * grid`` times in the text, where the picture's features go."""
        return int(self.model.config.image_token_id)

    def prepare(self, images: Tensor) -> Tensor:
        """The teacher's own view of pictures uint8 (n, 3, h, w): float32 (n, 3, size, size)."""
        arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
        out: Tensor = self.processor.image_processor(arrays, return_tensors="pt")["pixel_values"]
        return out

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """g(X): what CLIP hands to the projector for pictures uint8 (n, 3, h, w). Shape (n, grid * grid, width)."""
        seen: list[Tensor] = []
        handle = self.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            for part in torch.split(images, batch_size):
                self.model.get_image_features(pixel_values=self.prepare(part))
        finally:
            handle.remove()
        return torch.cat(seen)

    def embeddings(self, ids: Tensor, z: Tensor) -> Tensor:
        """The language model's input: text ids (n, t) embedded, H_v = W Z_v in the picture's places. Shape (n, t, d)."""
        text: Tensor = self.model.get_input_embeddings()(ids)
        h: Tensor = self.projector(z)  # eq. (1)
        there = (ids == self.image_token).unsqueeze(-1).expand_as(text)
        return text.masked_scatter(there, h.to(text.dtype))


def locate(name: str, bundled: str = "mini-llava") -> str:
    """What to load from: the bundled folder for "mini", else ``name`` (a folder or a hub id).

    Raises:
        UserError: the bundled weights are missing, or ``name`` looks like a folder that is not there.
    """
    if name == "mini":
        if not (BUNDLED / bundled / "config.json").exists():
            raise UserError(BUNDLED / bundled, "the bundled model is missing", "run `make teachers`")
        return str(BUNDLED / bundled)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (Path(name).expanduser() / "config.json").exists():
        raise UserError(
            name,
            "no model folder (no config.json)",
            "give a Hugging Face folder, a hub id such as llava-hf/llava-1.5-7b-hf, or mini",
        )
    return str(Path(name).expanduser()) if looks_local else name


SAYS = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""Endings of the files that decide what a model says: configuration, preprocessing, tokenizer, weights."""


def fingerprint(name: str) -> str | None:
    """SHA-256 over a model's files in Hugging Face's layout, by name; None when they are not on this machine.

    Nothing is loaded or fetched: of a hub id the files in the local cache count. ``name`` as in :func:`locate`.
    """
    folder = Path(name).expanduser() if name != "mini" else BUNDLED / "mini-llava"
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            return None
        from transformers.utils import cached_file

        found = cached_file(
            name, "config.json", local_files_only=True,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is None:
            return None
        folder = Path(found).parent
    files = sorted(p for p in folder.iterdir() if p.suffix in SAYS and p.is_file())
    if not files:
        return None
    h = hashlib.sha256()
    for path in files:
        with path.open("rb") as f:
            h.update(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return h.hexdigest()


def load_llava(name: str = "mini", expect_width: int | None = None) -> LlavaTeacher:
    """A LLaVA by the name "mini", a local folder, or a hub id; in evaluation mode, nothing trainable.

    The geometry is checked before the weights are loaded. ``expect_width``: the adapter width of the compact model, checked as well.

    Raises:
        UserError: nothing there, another family, image tokens != features, adapter width != projector width (names both numbers).
    """
    bridge_torchvision()
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    where = locate(name)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where)
            family = str(config.model_type)
            if family not in PROJECTOR:
                raise UserError(
                    name, f"a teacher of the family {family!r} is not supported", f"supported: {', '.join(PROJECTOR)}"
                )
            processor = AutoProcessor.from_pretrained(
                where, backend="pil"
            )  # the same pixels with and without torchvision
            grid, width = geometry(name, config, processor)
            if expect_width is not None and expect_width != width:
                raise UserError(
                    "model.adapter_dim",
                    f"is {expect_width}, but the projector of {name!r} takes {width} channels",
                    f"set it to {width}",
                )
            model = LlavaForConditionalGeneration.from_pretrained(where, dtype=torch.float32)
        except (OSError, ValueError) as e:
            first = " ".join(str(e).split())[:200]
            raise UserError(
                name,
                f"cannot be loaded as a LLaVA ({first})",
                "give a complete Hugging Face folder, or a hub id and network",
            ) from None
    return LlavaTeacher(name, model.eval().requires_grad_(False), processor, grid, width)


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


def geometry(name: str, config: Any, processor: Any) -> tuple[int, int]:
    """(side of the token grid, channels) at the projector's input, from configuration and processor alone.

    Raises:
        UserError: the processor's image tokens differ from the features; names both numbers.
    """
    vision = config.vision_config
    side = int(vision.image_size) // int(vision.patch_size)
    features = side * side + (0 if config.vision_feature_select_strategy == "default" else 1)
    from PIL import Image

    blank = Image.new("RGB", (vision.image_size, vision.image_size))
    ids = processor(text=processor.image_token, images=blank)["input_ids"]
    flat = ids[0] if isinstance(ids[0], list) else ids
    tokens = sum(int(i) == int(config.image_token_id) for i in flat)
    if tokens != features:
        raise UserError(
            name,
            f"its processor writes {tokens} image tokens, but its vision tower gives {features} features",
            "patch_size, num_additional_image_tokens and vision_feature_select_strategy of the processor must fit the model",
        )
    if features != side * side:
        raise UserError(
            name,
            f"its {features} features are no square grid (the class token is kept)",
            'use vision_feature_select_strategy = "default"',
        )
    layer = config.vision_feature_layer
    return side, int(vision.hidden_size) * (1 if isinstance(layer, int) else len(layer))
