"""MobileNet V1 (arXiv:1704.04861) and V2 (arXiv:1801.04381) with the module names of HRank+ and Distiller.

torchvision has a V2 of its own (``mobilenet_v2``), which is the same network under other names.
State-dict keys of HRank+: V1 ``conv1.0 | 1``, ``features.{i}.0 | 1 | 3 | 4``, ``classifier.0``; V2 ``features.0.0 | 1``,
``features.{i}.conv.{j}``, ``features.18.0 | 1``, ``classifier.1``. Of Distiller: V1 ``model.{i}.{j}``, ``fc``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.resnet import initialise_convolutions_

STEM = 32
# Output channels and stride of the pairs of a depthwise and a pointwise convolution.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# Expansion, output channels, blocks, stride of the first.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
LAST = 1280


def _convolution(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, limit: bool = False) -> list[nn.Module]:
    """Return a convolution, batch norm and ReLU; ReLU6 with ``limit``."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True) if limit else nn.ReLU(inplace=True)]


def _pairs() -> list[nn.Sequential]:
    pairs, c_in = [], STEM
    for c_out, stride in PAIRS:
        pairs.append(nn.Sequential(*_convolution(c_in, c_in, 3, stride, c_in), *_convolution(c_in, c_out, 1)))
        c_in = c_out
    return pairs


class MobileNetV1(nn.Module):
    """A stem and thirteen depthwise-pointwise pairs, named as in HRank+. Input [B, C, 224, 224]."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_convolution(channels, STEM, 3, 2))
        self.features = nn.Sequential(*_pairs())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Sequential(nn.Linear(PAIRS[-1][0], num_classes))
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.avgpool(self.features(self.conv1(x))).flatten(1)))


class MobileNetV1Sequential(nn.Module):
    """The same network, named as in Distiller: stem and pairs are one sequence, ``model``."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Sequential(*_convolution(channels, STEM, 3, 2)), *_pairs(), nn.AdaptiveAvgPool2d(1))
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(PAIRS[-1][0], num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.model(x).flatten(1)))


class InvertedResidual(nn.Module):
    """An expansion, a depthwise and a linear pointwise convolution; with a shortcut where the shapes allow it."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [] if expansion == 1 else _convolution(c_in, hidden, 1, limit=True)
        project = _convolution(hidden, c_out, 1)[:2]
        self.conv = nn.Sequential(*expand, *_convolution(hidden, hidden, 3, stride, hidden, limit=True), *project)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals and a 1x1 convolution, named as in HRank+. Input [B, C, 224, 224]."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*_convolution(channels, STEM, 3, 2, limit=True))]
        c_in = STEM
        for expansion, c_out, blocks, stride in STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(c_in, c_out, 1 if block else stride, expansion))
                c_in = c_out
        layers.append(nn.Sequential(*_convolution(c_in, LAST, 1, limit=True)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST, num_classes))
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
