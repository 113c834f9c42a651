"""The compact model: the counts of CReFF's ResNet-8, and one adapter for tokens and pooled feature."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_fl.errors import UserError
from mllm_fl.models.network import ModelConfig, build_network


@pytest.mark.parametrize(
    ("width", "classes", "parameters"), [(64, 10, 1_227_594), (64, 100, 1_250_724), (16, 10, 78_042), (16, 100, 83_892)]
)
def test_parameter_counts(width: int, classes: int, parameters: int) -> None:
    net = build_network(ModelConfig(width=width), classes, 0)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_multiply_adds_of_the_wide_one() -> None:
    net = build_network(ModelConfig(width=64), 10, 0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * (194_707_456 + 2_560)  # convolutions + classifier, two operations each


def test_clip2fl_network_has_its_parameters() -> None:
    net = build_network(ModelConfig(width=64, adapter="linear", adapter_dim=512), 10, 0)
    assert sum(p.numel() for p in net.parameters()) == 1_361_738


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_mean_of_the_tokens_is_the_pooled_feature(adapter: str) -> None:
    net = build_network(ModelConfig(width=4, adapter=adapter, adapter_dim=8), 3, 0).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, (feature, logits) = net.tokens(x, 4), net(x)
    assert tokens.shape == (2, 16, 8)
    assert logits.shape == (2, 3)
    assert torch.allclose(tokens.mean(1), feature, atol=1e-6)


@pytest.mark.parametrize("grid", [2, 4, 6])
def test_tokens_fit_any_grid(grid: int) -> None:
    net = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=8), 3, 0).eval()
    assert net.tokens(torch.zeros(1, 3, 16, 16), grid).shape == (1, grid * grid, 8)


def test_feature_norm_has_no_parameters_and_normalises() -> None:
    plain, normed = (build_network(ModelConfig(width=4, feature_norm=n), 3, 0).eval() for n in ("none", "layernorm"))  # type: ignore[arg-type]
    assert plain.state_dict().keys() == normed.state_dict().keys()
    feature = normed(torch.rand(2, 3, 16, 16))[0]
    assert torch.allclose(feature.mean(1), torch.zeros(2), atol=1e-5)


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    before = torch.random.get_rng_state()
    a = build_network(ModelConfig(width=2), 3, 0).state_dict()
    torch.rand(7)
    b, c = (
        build_network(ModelConfig(width=2), 3, 0).state_dict(),
        build_network(ModelConfig(width=2), 3, 1).state_dict(),
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(
        a["conv.weight" if "conv.weight" in a else "backbone.conv.weight"], c["backbone.conv.weight"]
    )
    torch.random.set_rng_state(before)


def test_resnet50_is_torchvisions() -> None:
    net = build_network(ModelConfig(name="resnet50"), 10, 0).eval()
    assert sum(p.numel() for p in net.backbone.parameters()) == 23_508_032
    assert net(torch.zeros(1, 3, 64, 64))[0].shape == (1, 2048)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_any_timm_model(name: str) -> None:
    net = build_network(ModelConfig(name=f"timm:{name}", adapter="linear", adapter_dim=8), 5, 0).eval()
    assert net.tokens(torch.zeros(1, 3, 224, 224), 4).shape == (1, 16, 8)
    assert net(torch.zeros(1, 3, 224, 224))[1].shape == (1, 5)


def test_unknown_names_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"model.name: unknown model 'resnet9'; use resnet8"):
        build_network(ModelConfig(name="resnet9"), 10, 0)
    with pytest.raises(UserError, match=r"timm knows no model 'resnet5x'"):
        build_network(ModelConfig(name="timm:resnet5x"), 10, 0)
