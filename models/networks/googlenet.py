"""GoogLeNet for 32 px images (arXiv:1409.4842), with batch norm and two 3x3 convolutions for each 5x5 one, as HRank prunes it.

State-dict keys are HRank's: ``pre_layers.0``, ``inception_a3.branch1x1.0``, ``branch3x3.0 | 3``, ``branch5x5.0 | 3 | 6``,
``branch_pool.1``, ``linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.resnet import initialise_convolutions_

# Output channels: 1x1; 3x3 and the 1x1 before it; 5x5 and the 1x1 before it; 1x1 behind the pool. M is a 3x3 max pool of stride 2.
LAYOUT: dict[str, tuple[int, int, int, int, int, int] | str] = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "maxpool1": "M",
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "maxpool2": "M",
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
INCEPTIONS = tuple(f"inception_{name}" for name, widths in LAYOUT.items() if widths != "M")


def _convolutions(*widths_and_kernels: tuple[int, int], c_in: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width, kernel in widths_and_kernels:
        layers += [nn.Conv2d(c_in, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        c_in = width
    return layers


class Inception(nn.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, c_in: int, n1x1: int, reduced3x3: int, n3x3: int, reduced5x5: int, n5x5: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = nn.Sequential(*_convolutions((n1x1, 1), c_in=c_in))
        self.branch3x3 = nn.Sequential(*_convolutions((reduced3x3, 1), (n3x3, 3), c_in=c_in))
        self.branch5x5 = nn.Sequential(*_convolutions((reduced5x5, 1), (n5x5, 3), (n5x5, 3), c_in=c_in))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_convolutions((pooled, 1), c_in=c_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)], 1)


class CifarGoogLeNet(nn.Module):
    """A 3x3 stem, nine inceptions in three stages, a global average pool. Input [B, C, 32, 32]."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        c_in = 192
        self.pre_layers = nn.Sequential(*_convolutions((c_in, 3), c_in=channels))
        self.stages: list[str] = []
        for name, widths in LAYOUT.items():
            if isinstance(widths, str):
                self.stages.append(name)
                self.add_module(name, nn.MaxPool2d(3, 2, 1))
                continue
            self.stages.append(f"inception_{name}")
            self.add_module(f"inception_{name}", Inception(c_in, *widths))
            c_in = widths[0] + widths[2] + widths[4] + widths[5]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.linear = nn.Linear(c_in, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(self.dropout(self.avgpool(x).flatten(1)))
