"""ResNet-8 for small images, the 6n+2 network with n = 1 (He et al. 2015, arXiv:1512.03385, §4.2), as CReFF widens it.

conv3x3-BN-ReLU, three basic blocks of ``width``, 2 ``width``, 4 ``width`` channels (strides 1, 2, 2; a 1x1
convolution with BatchNorm where the shape changes), global average pooling. With width 64 and ten classes
the network with its classifier has 1,227,594 parameters and 194.71 M multiply-adds on a 32 x 32 image.
Convolutions start from N(0, 2 / (k*k*C_out)), BatchNorm from gamma 1 and beta 0.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4
"""Pixels of the image a side per position of the feature map."""


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); (n, c_in, h, w) -> (n, c_out, h/stride, w/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet8(nn.Module):
    """The backbone: images (n, 3, h, w) -> feature map (n, 4 * width, h/4, w/4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = 4 * width
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 4 * width, 2)
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                k = m.kernel_size[0]
                nn.init.normal_(m.weight, 0.0, math.sqrt(2.0 / (k * k * m.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stages(F.relu(self.bn(self.conv(x))))
        return out
