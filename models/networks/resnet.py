"""Residual networks (arXiv:1512.03385): ImageNet's 18 to 152 layers and CIFAR's 20 to 110.

State-dict keys are torchvision's (``layer1.0.conv1.weight``, ``downsample.0.weight``, ``fc.weight``); the CIFAR
networks use the same names. Their shortcuts come in both of the paper's forms: A pads with zero channels and has no
parameters (HRank's and most public CIFAR checkpoints), B is a 1x1 convolution with batch norm (Distiller's).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_source(c_in: int, c_out: int) -> Tensor:
    """Return the input channel of each output channel, int64 [c_out], -1 for a zero channel; where fewer go out, both ends are left out."""
    source = torch.arange(c_out) - (c_out - c_in) // 2
    return torch.where((source >= 0) & (source < c_in), source, -1)


def pad_sources(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the buffers of a CIFAR-ResNet's shortcuts of option A that a narrow state dict lacks, as HRank+ pads and crops."""
    found = {}
    for name, module in model.named_modules():
        block = name.rpartition(".downsample")[0]
        first, last = (state.get(f"{block}.{conv}.weight") for conv in ("conv1", "conv2"))
        if isinstance(module, PadShortcut) and f"{name}.source" not in state and first is not None and last is not None:
            found[f"{name}.source"] = pad_source(first.shape[1], last.shape[0])
    return found


class PadShortcut(nn.Module):
    """Option A: subsample the map, and put zero channels before and after its channels.

    ``source[j]`` is the input channel that output channel j copies, or -1 for a zero channel, which ``forward`` appends.
    It is data, not arithmetic on widths, so that input and output channels can be cut independently.
    """

    source: Tensor

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("source", pad_source(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 1))[:, self.source]


def conv_shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Option B: a 1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, c_in: int, c_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_mid, c_mid, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, c_in: int, c_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        c_out = c_mid * self.expansion
        self.conv1 = nn.Conv2d(c_in, c_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.conv3 = nn.Conv2d(c_mid, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock] | type[Bottleneck]


def _stage(block: Block, c_in: int, c_mid: int, depth: int, stride: int, option_a: bool = False) -> nn.Sequential:
    c_out = c_mid * block.expansion
    shortcut: nn.Module | None = None
    if option_a:  # in the first stage too, where it is the identity: the stem can then be cut independently of the stage
        shortcut = PadShortcut(c_in, c_out, stride)
    elif stride != 1 or c_in != c_out:
        shortcut = conv_shortcut(c_in, c_out, stride)
    first = block(c_in, c_mid, stride, shortcut)
    return nn.Sequential(first, *(block(c_out, c_mid, 1, None) for _ in range(depth - 1)))


def initialise_convolutions_(model: nn.Module) -> None:
    """Draw the weights of all convolutions by He's method, in place (arXiv:1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            with torch.no_grad():  # torch counts the outputs of all groups
                module.weight.mul_(module.groups**0.5)


class ResNet(nn.Module):
    """ImageNet's form: 7x7 stride-2 stem, max pool, four stages. Input [B, C, 224, 224]."""

    def __init__(self, block: Block, depths: tuple[int, int, int, int], num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, 64, 64, depths[0], 1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


class CifarResNet(nn.Module):
    """CIFAR's form: 3x3 stem, three stages of ``depth`` blocks with 16, 32, 64 channels. Input [B, C, 32, 32]."""

    def __init__(self, depth: int, option_a: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, 16, 16, depth, 1, option_a)
        self.layer2 = _stage(BasicBlock, 16, 32, depth, 2, option_a)
        self.layer3 = _stage(BasicBlock, 32, 64, depth, 2, option_a)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(64, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


# Layers -> kind of block, and blocks per stage.
IMAGENET_DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
CIFAR_DEPTHS = (20, 32, 44, 56, 110)  # layers: 6 n + 2 with n blocks per stage
