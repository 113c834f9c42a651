"""The CLIP teacher: zero-shot logits by their definition, the card's number, and files that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mllm_fl.data.digits import load_digits
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.clip import BUNDLED, ClipTeacher, TeacherConfig, load_clip, load_teacher
from mllm_fl.models.teacher.prompt_sets import SETS


@pytest.fixture(scope="module")
def mini() -> ClipTeacher:
    return load_clip("mini")


def test_zero_shot_by_its_definition(mini: ClipTeacher) -> None:
    images = load_digits(16)[1].read(range(4))
    names, templates = ("zero", "one"), ("a photo of the digit {}", "the digit {}")
    image = mini.model.get_image_features(pixel_values=images.float() / 127.5 - 1).pooler_output
    text = []
    for name in names:
        ids = [mini.tokenizer(t.format(name), return_tensors="pt") for t in templates]
        rows = [F.normalize(mini.model.get_text_features(**i).pooler_output[0], dim=0) for i in ids]
        text.append(F.normalize((rows[0] + rows[1]) / 2, dim=0))
    expected = mini.model.logit_scale.exp() * F.normalize(image, dim=1) @ torch.stack(text).T
    assert torch.allclose(mini.zero_shot(images, names, templates), expected, atol=1e-3)


def test_accuracy_on_real_digits_is_the_cards(mini: ClipTeacher) -> None:
    test = load_digits(16)[1]
    right = mini.zero_shot(test.read(range(len(test))), test.class_names).argmax(1) == torch.from_numpy(test.labels)
    card = json.loads((BUNDLED / "card.json").read_text())
    assert float(right.double().mean()) == pytest.approx(
        card["clip"]["test_half"], abs=0.005
    )  # chips round differently
    assert card["clip"]["zero_shot"] > 0.7


def test_class_words_are_told_apart(mini: ClipTeacher) -> None:
    """The trap of an end token 2: all prompts pooled before the class word, and so equal."""
    e = mini.class_embeddings(load_digits(16)[1].class_names)
    assert float((e @ e.T - torch.eye(10)).max()) < 0.95
    assert mini.model.config.text_config.eos_token_id == mini.tokenizer.eos_token_id != 2


def test_it_is_frozen_and_small(mini: ClipTeacher) -> None:
    assert not any(p.requires_grad for p in mini.model.parameters()) and not mini.model.training
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file()) <= 10_000_000


def test_underscores_are_spaces(mini: ClipTeacher) -> None:
    assert torch.equal(mini.class_embeddings(["the_digit_one"]), mini.class_embeddings(["the digit one"]))


def test_underscores_are_kept_on_request(mini: ClipTeacher) -> None:
    """One word with underscores is another text: unknown to the bundled vocabulary, so all such names are alike."""
    kept = load_teacher(TeacherConfig(keep_underscores=True))
    e = kept.class_embeddings(["digit_one", "digit_two"])
    assert torch.equal(e[0], e[1]) and not torch.equal(e[0], mini.class_embeddings(["digit_one"])[0])
    asked = load_teacher(TeacherConfig(templates=("the {}",)))
    assert torch.equal(asked.class_embeddings(["one"]), mini.class_embeddings(["one"], ["the {}"]))
    assert not torch.equal(asked.class_embeddings(["one"]), mini.class_embeddings(["one"]))
    assert len({t.fingerprint for t in (mini, kept, asked)}) == 3


def test_a_long_text_is_cut_at_the_models_positions_and_keeps_its_end(mini: ClipTeacher) -> None:
    assert mini.tokenizer.model_max_length == 128 > mini.model.config.text_config.max_position_embeddings == 24
    long = "the digit one " * 30
    first = mini.encode_texts([long])
    assert torch.equal(first, mini.encode_texts(["the digit one " * 8]))  # beyond 22 words nothing is read
    assert not torch.equal(first, mini.encode_texts(["the digit two " * 30]))  # pooled at an end that is there


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (2, "eos_token_id 2 makes CLIP pool its text at the highest token id"),
        (5, "the model pools its text at token 5, but the tokenizer ends texts with 3"),
        (None, "its tokenizer does not put the end token 3 after a text"),
    ],
)
def test_a_tokenizer_that_ends_texts_where_the_model_does_not_pool_is_refused(
    tmp_path: Path, end: int | None, says: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(BUNDLED / "mini-clip", folder)
    config, words = (json.loads((folder / f).read_text()) for f in ("config.json", "tokenizer.json"))
    if end is None:
        words["post_processor"]["single"].pop()
    else:
        config["text_config"]["eos_token_id"] = end
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=says):
        load_clip(str(folder))


def test_fingerprint_changes_with_prompts_weights_and_preprocessing_only(mini: ClipTeacher, tmp_path: Path) -> None:
    def changed(name: str, file: str | None, old: bytes = b"", new: bytes = b"") -> ClipTeacher:
        folder = tmp_path / name
        shutil.copytree(BUNDLED / "mini-clip", folder)
        if file:
            before = (folder / file).read_bytes()
            (folder / file).write_bytes(before.replace(old, new) if old else before[:-1] + bytes([before[-1] ^ 1]))
            assert (folder / file).read_bytes() != before
        return load_clip(str(folder))

    assert changed("copy", None).fingerprint == mini.fingerprint
    prompts = changed("prompts", "templates.txt", b"the digit {}\na", b"the {}\na")
    assert prompts.templates[1] == "the {}"
    pixels = changed("pixels", "preprocessor_config.json", b"0.5", b"0.4")
    weights = changed("weights", "model.safetensors")
    words = changed("words", "tokenizer.json", b'"Lowercase"', b'"NFC"')
    network = changed("network", "config.json", b'"gelu"', b'"relu"')
    assert len({t.fingerprint for t in (mini, prompts, pixels, weights, words, network)}) == 6


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.name: no folder /nowhere/clip"):
        load_clip("/nowhere/clip")
    broken = tmp_path / "clip"
    shutil.copytree(BUNDLED / "mini-clip", broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be loaded as CLIP"):
        load_clip(str(broken))
    with pytest.raises(UserError, match="cannot be loaded as CLIP .*; check the folder, or be online"):
        load_clip("no-such/model")


def test_templates_need_one_place_for_the_class() -> None:
    with pytest.raises(UserError, match=r"teacher.templates: 'a photo' needs exactly one \{\}"):
        TeacherConfig(templates=("a photo",))


def test_prompt_sets_are_openais_lists() -> None:
    """Counts and a few members; the 80 are distinct, and each prompt has one place for the class name."""
    assert {k: len(v) for k, v in SETS.items()} == {"single": 1, "cifar18": 18, "imagenet80": 80}
    for prompts in SETS.values():
        assert len(set(prompts)) == len(prompts) and all(p.count("{}") == 1 for p in prompts)
    assert "a low contrast photo of the {}." in SETS["cifar18"] and "a rendition of the {}." in SETS["imagenet80"]
    assert TeacherConfig(templates=("single", "the {}")).prompts == ("a photo of a {}", "the {}")
    with pytest.raises(UserError, match="'cifar19' needs exactly one {} for the class name; or name a set: single, "):
        TeacherConfig(templates=("cifar19",))


def test_an_ensemble_is_the_normalised_mean_of_its_normalised_prompts(mini: ClipTeacher) -> None:
    asked = load_teacher(TeacherConfig(templates=("cifar18",)))
    rows = mini.encode_texts([p.format("aquarium fish") for p in SETS["cifar18"]])
    assert torch.allclose(asked.class_embeddings(["aquarium_fish"])[0], F.normalize(rows.mean(0), dim=0), atol=1e-6)


def small_siglip(folder: Path, mini: ClipTeacher, act: str = "gelu_pytorch_tanh") -> str:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(mini.tokenizer), "max_position_embeddings": 12, "hidden_act": act}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8}))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    mini.tokenizer.save_pretrained(folder)
    return str(folder)


def test_siglip_pads_texts_to_its_full_length_and_masks_nothing(mini: ClipTeacher, tmp_path: Path) -> None:
    clip = load_clip(small_siglip(tmp_path, mini))
    images = load_digits(16)[1].read(range(3))
    ids = mini.tokenizer(["a photo of a one"], padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 12)
    text = F.normalize(clip.model.get_text_features(input_ids=ids).pooler_output, dim=1)
    image = F.normalize(clip.model.get_image_features(pixel_values=images.float() / 127.5 - 1).pooler_output, dim=1)
    expected = clip.model.logit_scale.exp() * image @ text.T
    assert torch.allclose(clip.zero_shot(images, ["one"]), expected, atol=1e-4)
    assert clip.fingerprint == load_clip(str(tmp_path)).fingerprint


def test_two_activations_or_openais_weights_without_theirs_are_refused(mini: ClipTeacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its activation is gelu_pytorch_tanh and quick_gelu; write the hidden_act"):
        load_clip(small_siglip(tmp_path / "mixed", mini, "quick_gelu"))
    shutil.copytree(BUNDLED / "mini-clip", tmp_path / "clip-vit-base-patch32")
    with pytest.raises(UserError, match="its activation is gelu, but OpenAI's is quick_gelu"):
        load_clip(str(tmp_path / "clip-vit-base-patch32"))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("width", "size mismatch|cannot be loaded as CLIP"),
        ("kind", "it is a bert"),
        ("lack", "its weights lack 1 tensors of the network, visual_projection.weight"),
    ],
)
def test_a_teacher_of_another_width_or_kind_or_without_all_weights_is_one_line(
    tmp_path: Path, what: str, says: str
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(BUNDLED / "mini-clip", folder)
    config = json.loads((folder / "config.json").read_text())
    if what == "width":
        config["projection_dim"] = 7
    elif what == "kind":
        config = {"model_type": "bert"}
    else:
        weights = load_file(folder / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as found:
        load_clip(str(folder))
    assert "\n" not in str(found.value)
