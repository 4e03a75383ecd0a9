"""Plain networks for 32 px images in Distiller's form: Plain-20 (arXiv:1512.03385) and VGG (arXiv:1409.1556) with one linear layer.

State-dict keys and module names are Distiller's: ``layer1.0.conv1 | bn1 | relu1 | conv2 | bn2 | relu2``, ``fc``; of VGG
``features.{i}``, ``classifier``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.resnet import initialise_convolutions_


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with ReLU, and batch norm where ``normalised``."""

    def __init__(self, c_in: int, c_out: int, stride: int, normalised: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out) if normalised else nn.Identity()
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out) if normalised else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))


class Plain20(nn.Module):
    """ResNet-20 without its shortcuts. Input [B, C, 32, 32]."""

    def __init__(self, normalised: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        c_in = 16
        self.conv1 = nn.Conv2d(channels, c_in, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in) if normalised else nn.Identity()
        self.relu = nn.ReLU()
        for stage, width in enumerate((16, 32, 64), 1):
            first = PlainBlock(c_in, width, 1 if stage == 1 else 2, normalised)
            self.add_module(f"layer{stage}", nn.Sequential(first, *(PlainBlock(width, width, 1, normalised) for _ in range(2))))
            c_in = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(c_in, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


# Layers -> convolutions of each of the five stages; behind each is a 2x2 max pool.
VGG_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class PlainVGG(nn.Module):
    """VGG for CIFAR with a single linear layer. Input [B, C, 32, 32] or larger."""

    def __init__(self, layers: int, normalised: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        features: list[nn.Module] = []
        c_in = channels
        for width, depth in zip((64, 128, 256, 512, 512), VGG_DEPTHS[layers], strict=True):
            for _ in range(depth):
                features += [nn.Conv2d(c_in, width, 3, padding=1), *([nn.BatchNorm2d(width)] if normalised else []), nn.ReLU(inplace=True)]
                c_in = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Linear(c_in, num_classes)
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.avgpool(self.features(x)).flatten(1)))
