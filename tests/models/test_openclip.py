"""Teachers of open_clip: a small model in open_clip's own folder layout, offline; QuickGELU; what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mllm_fl.data.digits import load_digits
from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import TeacherConfig, load_clip, load_teacher
from mllm_fl.models.teacher.logits import teacher_logits

NET = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bridge_torchvision()
    import open_clip

    path = tmp_path_factory.mktemp("open") / "clip"
    path.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.CLIP(**NET)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path / "open_clip_model.safetensors")
    means = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": NET, "preprocess_cfg": means}))
    return path


def test_a_folder_of_open_clip_gives_logits_by_their_definition(folder: Path) -> None:
    import open_clip

    clip = load_clip(f"open_clip:local-dir:{folder}")
    images = load_digits(32)[1]
    net, tokenizer = clip.model, open_clip.get_tokenizer(f"local-dir:{folder}")
    x = (images.read(range(3)).float() / 255 - 0.5) / 0.25  # 32 pixels already: neither resized nor cut
    text = F.normalize(net.encode_text(tokenizer(["a photo of a zero", "a photo of a one"])), dim=1)
    expected = net.logit_scale.exp() * F.normalize(net.encode_image(x), dim=1) @ text.T
    assert torch.allclose(clip.zero_shot(images.read(range(3)), ["zero", "one"]), expected, atol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_its_fingerprint_tells_prompts_and_preprocessing_and_its_logits_are_kept(folder: Path, tmp_path: Path) -> None:
    name = f"open_clip:local-dir:{folder}"
    clip, other = load_clip(name), load_teacher(TeacherConfig(name, templates=("cifar18",)))
    assert len(other.templates) == 18 and clip.fingerprint != other.fingerprint == load_teacher(
        TeacherConfig(name, templates=("cifar18",))
    ).fingerprint  # fmt: skip
    images = load_digits(32)[1].subset(range(4))
    first = teacher_logits(other, images, images.class_names, tmp_path)
    assert torch.equal(teacher_logits(other, images, images.class_names, tmp_path), first)
    assert len(list(tmp_path.glob("zero-shot-*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("open_clip:local-dir:/nowhere", "/nowhere has no open_clip_config.json"),
        ("open_clip:ViT-B-33/openai", "open_clip has no model 'ViT-B-33'"),
        ("open_clip:ViT-B-32/theirs", "open_clip has no weights 'theirs' for ViT-B-32; write open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-32", "open_clip has no weights '' for ViT-B-32"),
        (
            "open_clip:ViT-B-32/openai",
            "were trained with QuickGELU, unlike ViT-B-32; write open_clip:ViT-B-32-quickgelu/openai",
        ),
        ("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k", "no weights 'laion2b_s34b_b79k' for ViT-B-32-quickgelu"),
    ],
)
def test_what_open_clip_does_not_have_is_one_line(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_clip(name)


def test_weights_of_another_width_and_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no weights as safetensors; save them so; pickles are not read"):
        load_clip(f"open_clip:local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(
        UserError, match=r"cannot be loaded by open_clip \(Error\(s\) in loading state_dict|size mismatch"
    ):
        load_clip(f"open_clip:local-dir:{tmp_path}")
