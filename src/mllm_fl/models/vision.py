"""Backbones from well-kept model zoos: torchvision's ResNet-50 and any timm model. Both optional."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision


def _zoo(name: str) -> Any:
    """torchvision.models or timm."""
    bridge_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError("model.name", f"needs {e.name or name}", "pip install 'mllm-fl[vision]'") from e


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without pooling and classifier: (n, 3, h, w) -> (n, 2048, h/32, w/32)."""

    def __init__(self) -> None:
        super().__init__()
        net = _zoo("torchvision.models").resnet50(weights=None)
        self.channels = 2048
        self.body = nn.Sequential(*[m for n, m in net.named_children() if n not in ("avgpool", "fc")])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class TimmBackbone(nn.Module):
    """Any timm model as (n, 3, h, w) -> (n, channels, h', w'); token outputs (n, tokens, channels) become a square map."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = _zoo("timm")
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
            raise UserError(
                "model.name",
                f"timm knows no model {name!r}",
                f"try one of {near}" if near else "see timm.list_models()",
            )
        self.net = timm.create_model(name, pretrained=False, num_classes=0)
        self.channels = int(self.net.num_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net.forward_features(x)
        if out.dim() == 3:  # (n, prefix + tokens, channels)
            out = out[:, int(getattr(self.net, "num_prefix_tokens", 0)) :]
            side = int(out.shape[1] ** 0.5)
            return out.transpose(1, 2).reshape(len(x), -1, side, side)
        if out.shape[1] != self.channels and out.shape[-1] == self.channels:  # channels-last families
            out = out.permute(0, 3, 1, 2)
        return out
