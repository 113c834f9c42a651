"""The compact model: the counts of CReFF's ResNet-8, and one adapter for tokens and pooled feature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def test_resnet8_by_hand() -> None:
    """He et al.'s blocks written out with functions: ReLU after the first layer, between a block's two, and after the sum."""
    net = build_network(ModelConfig(width=3), 3, 0).eval().double()
    w = {k.removeprefix("backbone."): v for k, v in net.state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    for k, v in w.items():
        if "bn" in k or "shortcut.1" in k:
            v.copy_(torch.rand(v.shape, generator=draws, dtype=torch.float64) + 0.5 if v.is_floating_point() else v)

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        out = F.relu(bn(F.conv2d(x, w[f"{name}.conv1.weight"], None, stride, 1), f"{name}.bn1"))
        out = bn(F.conv2d(out, w[f"{name}.conv2.weight"], None, 1, 1), f"{name}.bn2")
        if stride == 2:
            x = bn(F.conv2d(x, w[f"{name}.shortcut.0.weight"], None, 2), f"{name}.shortcut.1")
        return F.relu(out + x)

    x = torch.randn(2, 3, 16, 16, generator=draws, dtype=torch.float64)
    out = F.relu(bn(F.conv2d(x, w["conv.weight"], None, 1, 1), "bn"))
    for i, stride in enumerate((1, 2, 2)):
        out = block(out, f"stages.{i}", stride)
    assert torch.allclose(net.backbone(x), out, atol=1e-12)
    assert out.shape == (2, 12, 4, 4)


def test_resnet8_starts_from_the_normal_distribution_of_its_fan_out() -> None:
    net = build_network(ModelConfig(width=64), 10, 0)
    for name, conv in net.backbone.named_modules():
        if isinstance(conv, nn.Conv2d):
            n, expected = conv.weight.numel(), (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
            assert float(conv.weight.detach().std()) == pytest.approx(expected, rel=5 / (2 * n) ** 0.5), (
                name
            )  # five standard errors
            assert abs(float(conv.weight.detach().mean())) < 5 * expected / n**0.5, name
        if isinstance(conv, nn.BatchNorm2d):
            assert bool((conv.weight == 1).all()) and not bool(conv.bias.any())


def test_tokens_come_row_by_row() -> None:
    """A map whose value is 10 * row + column: token 4 * row + column, also after averaging down to a coarser grid."""

    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (10 * torch.arange(4.0)[:, None] + torch.arange(4.0))[None, None].expand(len(x), 1, 4, 4)

    net = build_network(ModelConfig(width=2), 3, 0)
    net.backbone = Map()  # type: ignore[assignment]
    assert net.tokens(torch.zeros(1, 3, 16, 16), 4)[0, :, 0].tolist() == [
        10 * r + c for r in range(4) for c in range(4)
    ]
    assert net.tokens(torch.zeros(1, 3, 16, 16), 2)[0, :, 0].tolist() == [5.5, 7.5, 25.5, 27.5]


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
