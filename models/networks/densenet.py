"""DenseNet-40 for 32 px images (arXiv:1608.06993: growth 12, no bottlenecks, no compression), as HRank prunes it.

State-dict keys are HRank's: ``conv1``, ``dense1.0.bn1 | conv1``, ``trans1.bn1 | conv1``, ``bn``, ``fc``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.resnet import initialise_convolutions_

GROWTH = 12
LAYERS = 12  # of each of the three dense blocks


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution whose output is appended to the input."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c_in, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(self.relu(self.bn1(x)))], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution of as many channels, and a 2x2 average pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(self.relu(self.bn1(x))), 2)


class CifarDenseNet(nn.Module):
    """A 3x3 stem, three dense blocks with transitions in between, a global average pool. Input [B, C, 32, 32]."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        width = 2 * GROWTH
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            self.add_module(f"dense{stage}", nn.Sequential(*(DenseLayer(width + i * GROWTH) for i in range(LAYERS))))
            width += LAYERS * GROWTH
            if stage < 3:
                self.add_module(f"trans{stage}", Transition(width))
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(width, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in ("dense1", "trans1", "dense2", "trans2", "dense3"):
            x = self.get_submodule(stage)(x)
        return self.fc(self.dropout(self.avgpool(self.relu(self.bn(x))).flatten(1)))
