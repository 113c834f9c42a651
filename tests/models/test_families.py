"""Eq. (2) in every family: at alpha 0 the plain loss exactly, at alpha 1 nothing of the teacher's picture, gradients in the compact model alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_families import batch_of, config_of, inputs_of, teacher_of
from torch import Tensor

from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.models.teacher.blend import blended, lm_loss, token_loss
from mllm_fl.models.teacher.families import FAMILIES, REFUSED, family_of, marks, qwen_order
from mllm_fl.models.teacher.llava import LlavaTeacher

ALL = ("llava", "llava-siglip", *[f for f in FAMILIES if f != "llava"])


@pytest.fixture(scope="module", params=ALL)
def teacher(request: pytest.FixtureRequest) -> LlavaTeacher:
    return teacher_of(request.param)


def network(teacher: LlavaTeacher) -> Network:
    return build_network(ModelConfig(width=4, adapter="linear", adapter_dim=teacher.width), 10, 0)


def student(teacher: LlavaTeacher, net: Network) -> Tensor:
    draws = torch.Generator().manual_seed(5)
    return net.tokens(torch.randn(2, 3, 16, 16, generator=draws), teacher.grid)


def plain(teacher: LlavaTeacher, seed: int) -> Tensor:
    ids, mask, labels = batch_of(teacher)
    extra = marks(teacher.family.types, ids, labels, teacher.image_token)
    out = teacher.model(input_ids=ids, attention_mask=mask, labels=labels, **inputs_of(teacher, 2, seed), **extra)
    loss: Tensor = out.loss
    return loss


def mixed(teacher: LlavaTeacher, tokens: Tensor, alpha: float, seed: int) -> Tensor:
    with blended(teacher, alpha, tokens):
        return plain(teacher, seed)


def seen(teacher: LlavaTeacher, seed: int) -> Tensor:
    """What CLIP hands to the projector."""
    found: list[Tensor] = []
    handle = teacher.projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    plain(teacher, seed)
    handle.remove()
    (z,) = found
    return z


def test_the_place_is_what_enters_the_projector(teacher: LlavaTeacher) -> None:
    packed = teacher.family.pack(student(teacher, network(teacher)), teacher.config, teacher.place)
    assert seen(teacher, 1).shape == packed.shape


def test_alpha_zero_is_the_plain_loss_exactly_and_teaches_nothing(teacher: LlavaTeacher) -> None:
    net = network(teacher)
    loss = mixed(teacher, student(teacher, net), 0.0, 1)
    assert torch.equal(loss, plain(teacher, 1))
    loss.backward()
    grads = [p.grad for k, p in net.named_parameters() if not k.startswith("classifier.")]
    assert all(g is not None and not g.any() for g in grads)


def test_alpha_one_does_not_depend_on_the_teachers_pixels(teacher: LlavaTeacher) -> None:
    tokens = student(teacher, network(teacher)).detach()
    assert torch.equal(mixed(teacher, tokens, 1.0, 1), mixed(teacher, tokens, 1.0, 2))
    assert not torch.equal(mixed(teacher, tokens, 0.5, 1), mixed(teacher, tokens, 0.5, 2))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_gradients_reach_the_compact_model_and_nothing_else(teacher: LlavaTeacher, alpha: float) -> None:
    net = network(teacher)
    mixed(teacher, student(teacher, net), alpha, 1).backward()
    reached = {k for k, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {k for k, _ in net.named_parameters() if not k.startswith("classifier.")}
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_from_features_is_that_of_the_hook(teacher: LlavaTeacher, alpha: float) -> None:
    net = network(teacher)
    tokens = student(teacher, net)
    slow = mixed(teacher, tokens, alpha, 1)
    if teacher.family.direct or alpha == 1:
        fast = lm_loss(teacher, *batch_of(teacher), tokens, alpha, None if alpha == 1 else seen(teacher, 1))
    else:
        shown = _Shown(**vars(teacher))
        fast = lm_loss(shown, *batch_of(teacher), tokens, alpha, images=torch.zeros(2, 3, 1, 1, dtype=torch.uint8))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)  # fewer logits, summed in another order
    weight = net.adapter.weight
    a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (fast, slow))  # type: ignore[arg-type]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


class _Shown(LlavaTeacher):
    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        return inputs_of(self, len(images), 1)


@pytest.mark.parametrize("family", ALL)
def test_at_alpha_one_the_vision_tower_is_not_run(family: str) -> None:
    teacher = teacher_of(family)
    tower = next(
        m
        for k, m in teacher.model.named_modules()
        if k.endswith(("vision_tower", "vision_model", "visual.patch_embed"))
    )
    calls: list[int] = []
    tower.register_forward_pre_hook(lambda *_: calls.append(1))
    lm_loss(teacher, *batch_of(teacher), student(teacher, network(teacher)).detach(), 1.0)
    assert calls == []
    plain(teacher, 1)
    assert calls == [1]


def test_a_model_without_the_official_entrance_takes_embeddings_or_the_hook() -> None:
    class Old(_Shown):
        takes_features = False  # type: ignore[assignment]

    for family in ("llava", "paligemma"):
        new = teacher_of(family)
        old = Old(**vars(new))
        tokens, z = student(new, network(new)).detach(), seen(new, 1)
        images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
        want = lm_loss(new, *batch_of(new), tokens, 0.3, z)
        torch.testing.assert_close(lm_loss(old, *batch_of(new), tokens, 0.3, z, images=images), want, rtol=1e-5, atol=0)


def test_deepstack_leaks_and_is_refused_by_name() -> None:
    """Qwen3-VL with the hook on its merger at alpha 1 still tells two pictures apart; that is why its name is refused."""
    import transformers as t

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sight: dict[str, Any] = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    like = config_of("qwen2_5_vl").text_config.to_dict() | {"head_dim": 8, "rope_parameters": rope}
    text = {k: like[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters")}  # fmt: skip
    config = t.Qwen3VLConfig(vision_config=sight, text_config=text, image_token_id=49)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = t.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.data.mul_(5) if p.dim() > 1 else None
    family = replace(FAMILIES["qwen2_5_vl"], pack=lambda tokens, config, place: tokens.flatten(0, 1))
    config.mllm_fl_grid = 4
    place = replace(family.place(config), tokens=4)
    teacher = LlavaTeacher("leaky", config, None, family, place, model)
    tokens = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for seed in (1, 2):
        pixels = torch.randn(2 * 16, 96, generator=torch.Generator().manual_seed(seed))
        ids, mask, labels = batch_of(teacher)
        with blended(teacher, 1.0, tokens):
            out = model(
                input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
                mm_token_type_ids=(ids == 49).long(),
            )  # fmt: skip
        losses.append(out.loss)
    assert not torch.equal(*losses)
    with pytest.raises(
        UserError,
        match=r"x: a teacher of the family 'qwen3_vl' is not supported: .*deepstack.*; supported: llava, vipllava",
    ):
        family_of("x", "qwen3_vl")


def test_every_refusal_has_a_reason_and_an_unknown_family_is_said_to_be_untested() -> None:
    assert all(REFUSED.values()) and not REFUSED.keys() & FAMILIES.keys()
    with pytest.raises(UserError, match="'fuyu' is not supported, it was not tested; supported"):
        family_of("x", "fuyu")


def test_a_picture_and_its_tile_stand_together() -> None:
    """LLaVA-NeXT reads picture by picture, each one whole and then as a tile: a a b b, not a b a b."""
    teacher = teacher_of("llava_next")
    tokens = torch.stack([torch.zeros(16, 8), torch.ones(16, 8)])
    packed = teacher.family.pack(tokens, teacher.config, teacher.place)
    assert packed[:, 0, 0].tolist() == [0, 0, 1, 1]


def test_qwens_order_groups_neighbours_and_goes_window_by_window() -> None:
    """6 x 6 positions, groups of 2 x 2, windows of 2 x 2 groups: the third group of the first window is the one below the first."""
    order = qwen_order(config_of("qwen2_5_vl"), 6)
    assert sorted(order.tolist()) == list(range(36))
    assert order[:16].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 12, 13, 18, 19, 14, 15, 20, 21]
    assert order[16:24].tolist() == [4, 5, 10, 11, 16, 17, 22, 23]  # the window at the right edge: one group wide


def test_qwens_order_is_that_of_its_own_tower() -> None:
    """A tower whose blocks do nothing hands each patch's embedding to the merger: position by position it must be ours."""
    teacher = teacher_of("qwen2_5_vl")
    for block in teacher.model.model.visual.blocks:
        block.forward = lambda x, **_: x
    grid, inputs = teacher.place.grid, inputs_of(teacher, 2, 1)
    rows = teacher.model.model.visual.patch_embed(inputs["pixel_values"]).view(2, grid // 2, grid // 2, 2, 2, -1)
    raster = rows.transpose(2, 3).reshape(2, grid * grid, -1)  # the processor writes 2 x 2 groups
    packed = teacher.family.pack(raster, teacher.config, teacher.place)
    assert torch.equal(seen(teacher, 1), packed)


@pytest.mark.parametrize(("kind", "name", "want"), [
    ("prefix", "token_type_ids", [0, 0, 0, 1, 1]), ("pictures", "token_type_ids", [0, 1, 0, 0, 0]), ("multimodal", "mm_token_type_ids", [0, 1, 0, 0, 0]),
])  # fmt: skip
def test_marks_of_tokens(kind: str, name: str, want: list[int]) -> None:
    ids, labels = torch.tensor([[1, 49, 5, 6, 0]]), torch.tensor([[-100, -100, -100, 6, -100]])
    assert {k: v.tolist() for k, v in marks(kind, ids, labels, 49).items()} == {name: [want]}
    assert marks(None, ids, labels, 49) == {}


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    draws = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 5, 7, generator=draws), torch.randint(0, 7, (4, 5), generator=draws)
    labels[0, :3], labels[2, 1:] = -100, -100
    count = int((labels[:, 1:] != -100).sum())
    parts = sum(token_loss(logits[i : i + 1], labels[i : i + 1], count) for i in range(4))
    torch.testing.assert_close(parts, token_loss(logits, labels))
    by_hand = -torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(token_loss(logits, labels), by_hand[labels[:, 1:] != -100].mean())
