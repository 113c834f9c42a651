"""Teachers of the open_clip package: ``open_clip:MODEL/TAG`` (fetched once, then cached) or ``open_clip:local-dir:FOLDER`` (offline).

The one file that imports open_clip. A folder is what open_clip itself writes for a hub: ``open_clip_config.json`` beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import ClipTeacher
from mllm_fl.models.teacher.llava import quiet
from mllm_fl.models.teacher.prompt_sets import SINGLE


@dataclass(frozen=True)
class OpenClipTeacher(ClipTeacher):
    """``processor``: open_clip's preprocessing of one picture; ``tokenizer``: its tokenizer; ``network``: its configuration."""

    network: str = ""

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int = 256) -> Tensor:
        out = [self.model.encode_image(self.pixel_values(x), normalize=True) for x in images.split(batch_size)]
        return torch.cat(out).float()

    def pixel_values(self, images: Tensor) -> Tensor:
        from PIL import Image

        return torch.stack([self.processor(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        found: Tensor = F.normalize(self.model.encode_text(self.tokenizer(list(texts))).float(), dim=1)
        return found

    def parts(self) -> list[Any]:
        words = getattr(self.tokenizer, "encoder", None) or repr(self.tokenizer)
        return [repr(self.processor), self.network, words, getattr(self.tokenizer, "context_length", None)]


def load_open_clip(name: str) -> ClipTeacher:
    """The teacher that ``name`` (with its ``open_clip:``) names.

    Raises:
        UserError: open_clip is not installed, no such model, tag or folder, weights that do not fit, or a model whose activation is
            not the one that the tag's weights were trained with (QuickGELU).
    """
    bridge_torchvision()
    rest = name.removeprefix("open_clip:")
    try:
        with quiet():
            import open_clip
    except ImportError:
        raise UserError("teacher.name", f"{name} needs the package open_clip", "pip install 'mllm-fl[clip]'") from None
    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:")).expanduser()
        if not (folder / "open_clip_config.json").exists():
            problem = f"{folder} has no open_clip_config.json"
            raise UserError("teacher.name", problem, "give the folder that open_clip saved, with its weights")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                "teacher.name", f"{folder} has no weights as safetensors", "save them so; pickles are not read"
            )
        model, tag = f"local-dir:{folder}", None
    else:
        model, _, tag = rest.partition("/")
        if model not in open_clip.list_models():
            raise UserError("teacher.name", f"open_clip has no model {model!r}", "open_clip.list_models() lists them")
        known = open_clip.list_pretrained_tags_by_model(model)
        if tag not in known:
            problem = f"open_clip has no weights {tag!r} for {model}"
            raise UserError("teacher.name", problem, f"write open_clip:{model}/TAG, TAG one of {', '.join(known)}")
        wanted = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))
        if wanted != bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False)):
            other = model.removesuffix("-quickgelu") if not wanted else f"{model}-quickgelu"
            problem = f"the weights {tag!r} were trained {'with' if wanted else 'without'} QuickGELU, unlike {model}"
            raise UserError("teacher.name", problem, f"write open_clip:{other}/{tag}")
    try:
        with quiet():
            net, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=tag, require_pretrained=True, load_weights=True
            )
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as e:
        why = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(
            "teacher.name", f"{name}: cannot be loaded by open_clip ({why})", "check the folder, or be online"
        ) from e
    config = (
        json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        if tag is None
        else open_clip.get_model_config(model)
    )
    net.eval().requires_grad_(False)
    return OpenClipTeacher(
        name, net, preprocess, tokenizer, SINGLE, network=json.dumps(config, sort_keys=True, default=str)
    )
