"""The frozen teacher and the blend, eq. (1) and (2), on a random LLaVA of a few thousand parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_llava import save_tiny
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.models.teacher.blend import blend, blended, lm_loss
from mllm_fl.models.teacher.conversation import IGNORED, Sample, check, collate, encode, shown
from mllm_fl.models.teacher.llava import LlavaTeacher, load_llava

TURNS = [
    ("<image>\nwhich character is this ?", "it is the digit three ."),
    ("which way does it lean ?", "it stands upright ."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> LlavaTeacher:
    return load_llava(str(folder))


@pytest.fixture
def network() -> Network:
    return build_network(ModelConfig(width=4, adapter="linear", adapter_dim=8), 10, 0)


def images(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(teacher: LlavaTeacher) -> tuple[Tensor, Tensor, Tensor]:
    samples = [encode(teacher, TURNS[:n], 512, "here") for n in (1, 2, 2)]
    return collate(samples, teacher.processor.tokenizer.pad_token_id)


def hooked(teacher: LlavaTeacher, student: Tensor, alpha: float, x: Tensor) -> Tensor:
    """The reference: plain LLaVA with the hook on the projector's input."""
    ids, mask, labels = batch(teacher)
    with blended(teacher, alpha, student):
        loss: Tensor = teacher.model(input_ids=ids, **teacher.pictures(x), attention_mask=mask, labels=labels).loss
    return loss


def plain(teacher: LlavaTeacher, x: Tensor) -> Tensor:
    ids, mask, labels = batch(teacher)
    loss: Tensor = teacher.model(input_ids=ids, **teacher.pictures(x), attention_mask=mask, labels=labels).loss
    return loss


def test_geometry_is_read_from_the_configuration(teacher: LlavaTeacher) -> None:
    assert (teacher.grid, teacher.width) == (4, 8)
    assert teacher.features(images()).shape == (3, 16, 8)


def test_nothing_of_the_teacher_is_trainable(teacher: LlavaTeacher) -> None:
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_alpha_zero_is_plain_llava_and_teaches_exactly_nothing(teacher: LlavaTeacher, network: Network) -> None:
    student = network.tokens(images().float() / 255, teacher.grid)
    loss = hooked(teacher, student, 0.0, images())
    assert torch.equal(loss, plain(teacher, images()))
    loss.backward()
    grads = [p.grad for n, p in network.named_parameters() if not n.startswith("classifier")]
    assert all(g is not None and not g.any() for g in grads)


def test_alpha_one_does_not_depend_on_the_teachers_pixels(teacher: LlavaTeacher, network: Network) -> None:
    student = network.tokens(images().float() / 255, teacher.grid)
    assert torch.equal(hooked(teacher, student, 1.0, images(1)), hooked(teacher, student, 1.0, images(2)))
    assert not torch.equal(hooked(teacher, student, 0.9, images(1)), hooked(teacher, student, 0.9, images(2)))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_gradients_reach_the_compact_model_and_nothing_frozen(
    teacher: LlavaTeacher, network: Network, alpha: float
) -> None:
    hooked(teacher, network.tokens(images().float() / 255, teacher.grid), alpha, images()).backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in network.named_parameters() if not n.startswith("classifier")
    )
    assert all(p.grad is None for p in teacher.model.parameters())
    assert network.classifier.weight.grad is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_precomputed_features_give_the_loss_and_gradients_of_the_hook(
    teacher: LlavaTeacher, network: Network, alpha: float
) -> None:
    student = network.tokens(images().float() / 255, teacher.grid)
    z = teacher.features(images()) if alpha != 1 else None
    fast = lm_loss(teacher, *batch(teacher), student, alpha, z)
    slow = hooked(teacher, student, alpha, images())
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=0)  # fewer logits, summed in another order
    (weight, _) = network.adapter.parameters()
    a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (fast, slow))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_hook_is_gone_afterwards_even_after_an_error(teacher: LlavaTeacher) -> None:
    before = plain(teacher, images())
    with pytest.raises(UserError, match=r"\(16, 8\).*\(16, 5\)"):
        hooked(teacher, torch.zeros(3, 16, 5), 0.5, images())
    assert torch.equal(plain(teacher, images()), before)


def test_blend_by_hand() -> None:
    z, s = torch.tensor([[[4.0]]]), torch.tensor([[[8.0]]])
    assert [float(blend(z, s, a)) for a in (0, 0.25, 1)] == [4, 5, 8]
    assert math.isnan(float(blend(z * math.nan, s, 0.5)))
    assert float(blend(z * math.nan, s, 1)) == 8  # alpha = 1 is g_fl(X) itself


def test_only_answers_are_predicted(teacher: LlavaTeacher) -> None:
    sample = encode(teacher, TURNS, 512, "here")
    told = shown(teacher, sample)
    assert told["predicted"] == "it is the digit three . <eos> it stands upright . <eos>"
    assert told["image_tokens"] == 16
    assert told["given"].startswith("<bos> user : which character is this ? assistant : user : which way")
    assert not (sample.labels[sample.ids == teacher.image_token] != IGNORED).any()


def test_a_sample_that_trains_nothing_is_refused(teacher: LlavaTeacher) -> None:
    with pytest.raises(UserError, match="record 7: nothing to predict: all 24 tokens are masked"):
        encode(teacher, TURNS, 24, "record 7")
    with pytest.raises(UserError, match="holds 7 image tokens, the teacher gives 16"):
        encode(teacher, TURNS, 10, "record 7")
    ids = torch.full((17,), teacher.image_token)
    ids[16] = 5
    with pytest.raises(UserError, match="image token carries a label"):
        check(teacher, Sample(ids, ids), "record 7")


@pytest.mark.parametrize("special", ["<eos>", "<bos>", "<image>", "<pad>"])
def test_text_that_would_be_read_as_a_special_token_is_refused(teacher: LlavaTeacher, special: str) -> None:
    asked, said = TURNS[0]
    with pytest.raises(
        UserError, match=rf"record 7: the answer of turn 1 contains '{special}', which the teacher reads"
    ):
        encode(teacher, [(asked, f"it is {special} three .")], 512, "record 7")
    with pytest.raises(UserError, match=rf"record 7: the question of turn 2 contains '{special}'"):
        encode(teacher, [TURNS[0], (f"and {special} ?", said)], 512, "record 7")


class Splitting:
    """A tokenizer that puts a token without characters before the words "it" and "three", and one after each answer's end."""

    is_fast = True

    def __init__(self, real: Any, mark: int) -> None:
        self.real, self.mark = real, mark
        self.eos_token, self.all_special_tokens = real.eos_token, real.all_special_tokens

    def __call__(self, text: str, **kwargs: Any) -> dict[str, Any]:
        out = self.real(text, **kwargs)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for i, (start, end) in zip(out["input_ids"], out["offset_mapping"], strict=True):
            if text[start:end] in ("it", "three"):
                ids, places = [*ids, self.mark], [*places, (start, start)]
            ids, places = [*ids, i], [*places, (start, end)]
            if text[start:end] == self.eos_token and self.mark not in ids[-2:]:
                ids, places = [*ids, self.mark], [*places, (end, end)]
        return {"input_ids": ids, "offset_mapping": places}


def test_tokens_without_characters_are_predicted_inside_an_answer_and_not_after_it(teacher: LlavaTeacher) -> None:
    real = teacher.processor.tokenizer
    mark = real.convert_tokens_to_ids(",")
    processor = SimpleNamespace(tokenizer=Splitting(real, mark), image_token=teacher.processor.image_token)
    sample = encode(replace(teacher, processor=processor), TURNS, 512, "here")
    marks = sample.ids == mark
    # it, three, after the end; "it" of the second question, it, after the end
    assert (sample.labels[marks] != IGNORED).tolist() == [True, True, False, False, True, False]
    assert sample.predicted == encode(teacher, TURNS, 512, "here").predicted + 3
    assert sample.labels[0] == IGNORED  # <bos> has no characters either


def test_padding_is_masked_and_not_predicted(teacher: LlavaTeacher) -> None:
    ids, mask, labels = batch(teacher)
    assert mask[0].sum() < mask[1].sum() == ids.shape[1]
    assert (labels[mask == 0] == IGNORED).all()


def test_image_tokens_that_do_not_fit_are_refused_before_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, patch=8)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="writes 4 image tokens, but its vision tower gives 16 features"):
        load_llava(str(tmp_path))


def test_an_adapter_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"model.adapter_dim: is 128, but the projector .* takes 8 channels; set it to 8"
    ):
        load_llava(str(folder), 128)


def test_what_is_no_llava_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        load_llava(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UserError, match="'qwen3_vl' is not supported: .*deepstack.*; supported: llava"):
        load_llava(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llava(str(tmp_path))


def test_the_projector_is_the_module_whose_input_is_blended(teacher: LlavaTeacher) -> None:
    assert isinstance(teacher.projector, nn.Module)
    assert teacher.projector is teacher.model.model.multi_modal_projector
