"""The CLIP teacher: any CLIP or SigLIP of transformers by name, any of open_clip, the bundled mini-CLIP by default. Frozen; gives q, the zero-shot output.

Radford et al. 2021, arXiv:2103.00020, §3.1: logits = exp(logit_scale) * cos(image, text), a class's text embedding being the
normalised mean of its normalised prompt embeddings. SigLIP (Zhai et al. 2023, arXiv:2303.15343) adds one bias to all logits, which a softmax over classes does not
see; it was trained by a sigmoid for each pair, so its q is a ranking of the classes more than a probability.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.llava import quiet
from mllm_fl.models.teacher.prompt_sets import SETS, SINGLE
from mllm_fl.trees import digest

BUNDLED = Path(__file__).parent / "bundled"
PLAIN = SINGLE  # the bundled teacher brings its own


@dataclass(frozen=True)
class TeacherConfig:
    """``[teacher]``: the CLIP that gives q. ``name``: "mini", a local folder or hub id of transformers' CLIP or SigLIP, or ``open_clip:MODEL/TAG``,
    ``open_clip:local-dir:FOLDER``.

    ``templates``: prompts with one ``{}`` for the class name, or names of sets: "single" ("a photo of a {}"), "cifar18", "imagenet80" (OpenAI's
    ensembles); absent means the model's own, else "single".
    ``keep_underscores``: class names as they are written, ``aquarium_fish``, as CLIP2FL's code has them; otherwise underscores are spaces.
    """

    name: str = "mini"
    templates: tuple[str, ...] = ()
    keep_underscores: bool = False

    def __post_init__(self) -> None:
        for t in self.templates:
            if t.count("{}") != 1 and t not in SETS:
                way_out = f"or name a set: {', '.join(SETS)}"
                raise UserError("teacher.templates", f"{t!r} needs exactly one {{}} for the class name", way_out)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of ``templates``, sets written out."""
        return tuple(prompt for t in self.templates for prompt in SETS.get(t, (t,)))


@dataclass(frozen=True)
class ClipTeacher:
    """A frozen CLIP with its own preprocessing. ``templates``: the prompts that are used unless others are given."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    templates: tuple[str, ...]
    keep_underscores: bool = False

    @property
    def logit_scale(self) -> float:
        """exp of the learned log scale: 100 for OpenAI's models."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Unit embeddings (n, d) of uint8 images (n, 3, height, width), un-augmented, by the model's own preprocessing."""
        out = [
            self.model.get_image_features(pixel_values=self.pixel_values(x)).pooler_output
            for x in images.split(batch_size)
        ]
        return F.normalize(torch.cat(out), dim=1)

    def pixel_values(self, images: Tensor) -> Tensor:
        """Preprocessed float images for the vision tower, from uint8 (n, 3, height, width)."""
        pictures = [x.permute(1, 2, 0).numpy() for x in images]
        values: Tensor = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return values

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d) of texts, cut at the length that the text tower has positions for, end token kept."""
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = self.model.get_text_features(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        ).pooler_output
        return F.normalize(out, dim=1)

    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Unit embedding (C, d) of each class: the mean over prompts; underscores in names are spaces unless they are kept."""
        names = list(class_names) if self.keep_underscores else [n.replace("_", " ") for n in class_names]
        rows = [
            F.normalize(self.encode_texts([t.format(n) for t in templates or self.templates]).mean(0), dim=0)
            for n in names
        ]
        return torch.stack(rows)

    def zero_shot(self, images: Tensor, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Zero-shot logits (n, C), float32, of uint8 images (n, 3, height, width)."""
        return self.logit_scale * self.encode_images(images) @ self.class_embeddings(class_names, templates).T

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, network, prompts, tokenizer and preprocessing: the key under which its logits may be cached.

        The same for one model wherever it lies and however its weights are cut into files.
        """
        says = [self.templates, self.keep_underscores, *self.parts()]
        h = hashlib.sha256(json.dumps(says, sort_keys=True, default=str).encode())
        h.update(digest(self.model.state_dict()).encode())
        return h.hexdigest()

    def parts(self) -> list[Any]:
        """Preprocessing, network and tokenizer as plain values."""
        config, words = self.model.config.to_dict(), json.loads(self.tokenizer.backend_tokenizer.to_str())
        network = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "dtype")}
        words = {k: v for k, v in words.items() if k not in ("padding", "truncation")}  # these are of the last call
        return [self.processor.to_dict(), network, words]

    def record(self) -> dict[str, Any]:
        """What a run notes about the teacher it used."""
        return {
            "name": self.name, "fingerprint": self.fingerprint, "templates": list(self.templates), "keep_underscores": self.keep_underscores,
        }  # fmt: skip


@dataclass(frozen=True)
class SiglipTeacher(ClipTeacher):
    """SigLIP: texts are padded to the tower's full length, as in its training, and nothing is masked."""

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        return F.normalize(self.model.get_text_features(input_ids=words["input_ids"]).pooler_output, dim=1)


def load_teacher(config: TeacherConfig) -> ClipTeacher:
    """The CLIP of ``[teacher]`` with the prompts and the spelling of names that the table asks for."""
    clip = load_clip(config.name)
    return replace(clip, templates=config.prompts or clip.templates, keep_underscores=config.keep_underscores)


def load_clip(name: str = "mini") -> ClipTeacher:
    """A CLIP or SigLIP by name: "mini" (bundled), a local folder in Hugging Face's layout, a hub id, or ``open_clip:...``.

    Raises:
        UserError: no such folder or model, damaged weights or weights of another width, another kind of model, towers of two activations,
            or a tokenizer whose end token breaks CLIP's text pooling.
    """
    bridge_torchvision()
    if name.startswith("open_clip:"):
        from mllm_fl.models.teacher.openclip import load_open_clip

        return load_open_clip(name)
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPModel,
        SiglipImageProcessorPil,
        SiglipModel,
    )

    folder = BUNDLED / "mini-clip" if name == "mini" else Path(name).expanduser()
    if name == "mini" and not (folder / "model.safetensors").exists():
        raise UserError("teacher.name", "the bundled mini-CLIP is not there", "run `make teachers`")
    local = folder.is_dir()
    where = str(folder) if local else name
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            "teacher.name", f"no folder {name}", "give a folder in Hugging Face's layout, a hub id, or 'mini'"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where)
            siglip = config.model_type == "siglip"
            if config.model_type not in ("clip", "siglip"):
                raise ValueError(f"it is a {config.model_type}, not a clip or siglip")
            loaded = (SiglipModel if siglip else CLIPModel).from_pretrained(
                where, use_safetensors=True, output_loading_info=True
            )
            processor = (SiglipImageProcessorPil if siglip else CLIPImageProcessorPil).from_pretrained(where)
            tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as e:
        why = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(
            "teacher.name", f"{name}: cannot be loaded as CLIP ({why})", "check the folder, or be online for a hub id"
        ) from e
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        problem = f"{name}: its weights lack {len(missing)} tensors of the network, {missing[0]} for one"
        raise UserError("teacher.name", problem, "fetch the whole model")
    _check_activation(name, model.config)
    if not siglip:
        _check_end(name, model.config.text_config, tokenizer)
    model.eval().requires_grad_(False)
    prompts = folder / "templates.txt"
    templates = tuple(prompts.read_text(encoding="utf-8").split("\n")[:-1]) if local and prompts.exists() else PLAIN
    return (SiglipTeacher if siglip else ClipTeacher)(name, model, processor, tokenizer, templates)


def _check_activation(name: str, config: Any) -> None:
    """Refuse towers of two activations, and OpenAI's weights without theirs: QuickGELU, x sigmoid(1.702 x); with another they answer, only worse."""
    acts = {config.text_config.hidden_act, config.vision_config.hidden_act}
    theirs = name.startswith("openai/") or Path(name).name.startswith("clip-vit-")
    if len(acts) > 1 or (theirs and acts != {"quick_gelu"}):
        raise UserError(
            "teacher.name",
            f"{name}: its activation is {' and '.join(sorted(acts))}"
            + (", but OpenAI's is quick_gelu" if theirs else ""),
            "write the hidden_act that it was trained with into its config.json",
        )


def _check_end(name: str, text: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end token is not where the text tower pools: all prompts would be embedded alike.

    The tower takes the first token that equals its ``eos_token_id``; where that is 2, as in the files that OpenAI's models came with, the
    token of the highest id.
    """
    end = int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else -1)
    if text.eos_token_id == 2:
        if end != text.vocab_size - 1:
            raise UserError(
                "teacher.name",
                f"{name}: eos_token_id 2 makes CLIP pool its text at the highest token id",
                "save it with another eos_token_id",
            )
    elif end != text.eos_token_id:
        raise UserError(
            "teacher.name",
            f"{name}: the model pools its text at token {text.eos_token_id}, but the tokenizer ends texts with {end}",
            "save model and tokenizer with the same eos_token_id",
        )
    if tokenizer("a")["input_ids"][-1] != end:
        raise UserError(
            "teacher.name",
            f"{name}: its tokenizer does not put the end token {end} after a text",
            "save the tokenizer that the model was trained with",
        )
