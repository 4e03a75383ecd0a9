"""Residual networks with pre-activation (arXiv:1603.05027): CIFAR's 20 to 110 layers and ImageNet's 18 to 152.

State-dict keys and module names are Distiller's: CIFAR ``layer1.0.pre_bn | pre_relu | conv1 | bn | relu | conv2``, ImageNet
``bn1_2 | relu1_2 | bn2_3 | relu2_3`` in place of ``bn | relu``; ``final_bn``, ``final_relu``, ``fc``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.resnet import PadShortcut, initialise_convolutions_

EXPANSION = 4  # of a bottleneck


class CifarPreactBlock(nn.Module):
    """Twice batch norm, ReLU and a 3x3 convolution, and a shortcut; a convolution in it reads what is activated."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.pre_bn = nn.BatchNorm2d(c_in)
        self.pre_relu = nn.ReLU()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        activated = self.pre_relu(self.pre_bn(x))
        y = self.conv2(self.relu(self.bn(self.conv1(activated))))
        if self.downsample is not None:
            x = self.downsample(activated if isinstance(self.downsample, nn.Conv2d) else x)
        return y + x


class CifarPreactResNet(nn.Module):
    """A 3x3 stem and three stages of ``depth`` blocks. Input [B, C, 32, 32].

    Where the width changes, the shortcut is an average pool and zero channels, or with ``conv_downsample`` a 1x1 convolution.
    """

    def __init__(self, depth: int, conv_downsample: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        c_in = 16
        self.conv1 = nn.Conv2d(channels, c_in, 3, 1, 1, bias=False)
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                shortcut: nn.Module | None = None
                if width != c_in and conv_downsample:
                    shortcut = nn.Conv2d(c_in, width, 1, stride, bias=False)
                elif width != c_in:
                    shortcut = nn.Sequential(nn.AvgPool2d(2), PadShortcut(c_in, width, 1))
                blocks.append(CifarPreactBlock(c_in, width, stride, shortcut))
                c_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.final_bn = nn.BatchNorm2d(c_in)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(c_in, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        return self.fc(self.dropout(self.avgpool(self.final_relu(self.final_bn(x))).flatten(1)))


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, or with ``bottleneck`` 1x1, 3x3 and 1x1, each behind batch norm and ReLU; and a shortcut.

    The very first block of a network reads what the stem has activated, and has no norm of its own in front.
    """

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool, first: bool, downsample: bool) -> None:
        super().__init__()
        c_out = width * EXPANSION if bottleneck else width
        self.pre_bn = None if first else nn.BatchNorm2d(c_in)
        self.pre_relu = None if first else nn.ReLU()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False) if bottleneck else nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1_2 = nn.BatchNorm2d(width)
        self.relu1_2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride if bottleneck else 1, 1, bias=False)
        if bottleneck:
            self.bn2_3 = nn.BatchNorm2d(width)
            self.relu2_3 = nn.ReLU()
            self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bottleneck = bottleneck
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False)) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.pre_bn is None or self.pre_relu is None else self.pre_relu(self.pre_bn(x))
        y = self.conv2(self.relu1_2(self.bn1_2(self.conv1(activated))))
        if self.bottleneck:
            y = self.conv3(self.relu2_3(self.bn2_3(y)))
        return y + (x if self.downsample is None else self.downsample(activated))


class PreactResNet(nn.Module):
    """ImageNet's form: 7x7 stride-2 stem, max pool, four stages. Input [B, C, 224, 224]."""

    def __init__(self, bottleneck: bool, depths: tuple[int, int, int, int], num_classes: int, channels: int) -> None:
        super().__init__()
        c_in = 64
        self.conv1 = nn.Conv2d(channels, c_in, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), 1):
            c_out, blocks = width * EXPANSION if bottleneck else width, []
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                downsample = stride != 1 or c_in != c_out
                blocks.append(PreactBlock(c_in, width, stride, bottleneck, stage == 1 and block == 0, downsample))
                c_in = c_out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.final_bn = nn.BatchNorm2d(c_in)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(c_in, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu1(self.bn1(self.conv1(x))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(stage)(x)
        return self.fc(self.dropout(self.avgpool(self.final_relu(self.final_bn(x))).flatten(1)))
