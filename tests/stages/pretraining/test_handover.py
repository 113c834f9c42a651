"""What stage 2 gets: the adapter or not, and a classifier that repeats CLIP's own zero-shot answer where the feature is CLIP's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.stages.pretraining.handover import handed_over, text_classifier

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def network(dim: int, norm: Any = "layernorm") -> Any:
    return build_network(ModelConfig(width=4, adapter="linear", adapter_dim=dim, feature_norm=norm), 10, 0)


def test_the_classifier_on_a_token_is_clips_own_logit_of_it() -> None:
    clip = load_clip("mini")
    net = network(128)
    tree = text_classifier(clip, NAMES, net)
    f = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    inner = clip.model.vision_model.post_layernorm if hasattr(clip.model, "vision_model") else None
    norm = inner or next(m for k, m in clip.model.named_modules() if k.endswith("post_layernorm"))
    with torch.no_grad():
        want = clip.model.visual_projection(norm(f)) @ clip.class_embeddings(NAMES).T
        got = F.layer_norm(f, (128,)) @ tree["classifier.weight"].T + tree["classifier.bias"]
    ratio = got / want
    assert float(ratio.std() / ratio.mean()) < 1e-3  # one scale for all
    assert float(tree["classifier.weight"].norm(dim=1).mean()) == pytest.approx(3**-0.5, rel=0.5)


def test_the_embedding_itself_where_the_widths_agree_and_both_numbers_where_none_does() -> None:
    texts = F.normalize(torch.randn(10, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    model = SimpleNamespace(visual_projection=torch.nn.Linear(40, 24, bias=False), named_modules=lambda: iter(()))
    clip: Any = SimpleNamespace(name="x", model=model, class_embeddings=lambda names: texts)
    tree = text_classifier(clip, NAMES, network(24))
    torch.testing.assert_close(tree["classifier.weight"], texts * 3**-0.5)
    assert not tree["classifier.bias"].any()
    with pytest.raises(
        UserError,
        match=r"the feature has 12 channels, the text embeddings of 'x' have 24, its image tokens 40; set model\.adapter_dim",
    ):
        text_classifier(clip, NAMES, network(12))


def test_what_is_handed_over() -> None:
    before = network(8).state_dict()
    tree = {k: v + 1 for k, v in before.items()}
    assert all(torch.equal(handed_over(tree, before, "adapter", None)[k], tree[k]) for k in tree)
    fresh = handed_over(tree, before, "backbone", None)
    changed = {k.split(".")[0] for k in tree if not torch.equal(fresh[k], before[k])}
    assert changed == {"backbone", "classifier"}
    given = {"classifier.weight": torch.ones(10, 8), "classifier.bias": torch.zeros(10)}
    assert torch.equal(handed_over(tree, before, "adapter", given)["classifier.weight"], torch.ones(10, 8))
    with pytest.raises(UserError, match="check the class names"):
        handed_over(tree, before, "adapter", {"classifier.weight": torch.ones(9, 8)})
