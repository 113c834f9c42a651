"""The compact model g_fl: backbone, adapter to the teacher's width, optional feature normalisation, classifier.

One set of weights serves all stages: stage 1 uses ``tokens`` (the feature map on the teacher's grid, each token
through the adapter), stages 2 and 3 use the pooled feature and the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.resnet8 import ResNet8
from mllm_fl.models.vision import ResNet50, TimmBackbone
from mllm_fl.seeds import seed_of


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: which network the clients train.

    ``width``: channels of ResNet-8's first stage (64 in CReFF and the paper). ``adapter``: from backbone width to
    ``adapter_dim``; "linear" is CLIP2FL's and our reading of the paper's "MLP". ``feature_norm``: a parameter-free
    LayerNorm on the feature before the classifier. ``batch_norm``: what a client starts a round with: the global
    average of running statistics ("average"), its own last ones ("local"), or mean 0, variance 1 ("reset");
    what it ends with is averaged for evaluation under all three.
    """

    name: str = "resnet8"
    width: int = 64
    adapter: Literal["none", "linear", "mlp"] = "none"
    adapter_dim: int = 128
    feature_norm: Literal["none", "layernorm"] = "none"
    batch_norm: Literal["average", "local", "reset"] = "average"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError("model.width", f"{self.width} is not a positive number of channels")
        if self.adapter_dim < 1:
            raise UserError("model.adapter_dim", f"{self.adapter_dim} is not a positive width")


class Network(nn.Module):
    """Images (n, 3, h, w) -> (feature (n, d), logits (n, C)); d is ``feature_dim``."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.backbone: ResNet8 | ResNet50 | TimmBackbone
        if config.name == "resnet8":
            self.backbone = ResNet8(config.width)
        elif config.name == "resnet50":
            self.backbone = ResNet50()
        elif config.name.startswith("timm:"):
            self.backbone = TimmBackbone(config.name.removeprefix("timm:"))
        else:
            raise UserError("model.name", f"unknown model {config.name!r}", "use resnet8, resnet50 or timm:NAME")
        channels = self.backbone.channels
        self.pool_first = config.adapter != "mlp"  # a linear map commutes with the mean over tokens
        self.feature_dim = channels if config.adapter == "none" else config.adapter_dim
        self.adapter: nn.Module = nn.Identity()
        if config.adapter == "linear":
            self.adapter = nn.Linear(channels, config.adapter_dim)
        elif config.adapter == "mlp":
            self.adapter = nn.Sequential(
                nn.Linear(channels, config.adapter_dim), nn.GELU(), nn.Linear(config.adapter_dim, config.adapter_dim)
            )
        self.normalise = config.feature_norm == "layernorm"
        self.classifier = nn.Linear(self.feature_dim, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pooled(self.backbone(x))
        if self.normalise:
            feature = F.layer_norm(feature, (self.feature_dim,))
        return feature, self.classifier(feature)

    def pooled(self, feature_map: Tensor) -> Tensor:
        """The adapter's output averaged over positions: (n, c, h, w) -> (n, d)."""
        if self.pool_first:
            out: Tensor = self.adapter(feature_map.mean((2, 3)))
            return out
        out = self.adapter(feature_map.flatten(2).transpose(1, 2)).mean(1)
        return out

    def tokens(self, x: Tensor, grid: int) -> Tensor:
        """The feature map on the teacher's grid, each position through the adapter: (n, grid * grid, d), row by row.

        A map of another size is resized: averaged down, or interpolated (bilinear) up.
        """
        m = self.backbone(x)
        if m.shape[-1] > grid:
            m = F.adaptive_avg_pool2d(m, grid)
        elif m.shape[-1] < grid:
            m = F.interpolate(m, size=(grid, grid), mode="bilinear", align_corners=False)
        out: Tensor = self.adapter(m.flatten(2).transpose(1, 2))
        return out


def build_network(config: ModelConfig, classes: int, seed: int) -> Network:
    """A freshly initialised network; the weights are a function of (config, classes, seed) alone.

    torch's initialisers, and those of the model zoos, draw from the global generator: it is seeded from the stream
    (seed, "init") inside a fork and put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "init"))
        return Network(config, classes)
