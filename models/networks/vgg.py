"""VGG-16 with batch norm for 32 px images (arXiv:1409.1556, in the form that HRank and its successors prune).

State-dict keys are HRank's: ``features.conv{i}``, ``features.norm{i}``, ``classifier.linear1 | norm1 | linear2``.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from models.networks.resnet import initialise_convolutions_

# Output channels of the 13 convolutions; M is a 2x2 max pool.
VGG16_LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class CifarVGG(nn.Module):
    """Thirteen 3x3 convolutions, a global average pool, one hidden linear layer. Input [B, C, 32, 32] or larger."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        features: OrderedDict[str, nn.Module] = OrderedDict()
        c_in, index = channels, 0
        for width in VGG16_LAYOUT:
            if isinstance(width, str):
                features[f"pool{index}"] = nn.MaxPool2d(2)
                continue
            features[f"conv{index}"] = nn.Conv2d(c_in, width, 3, padding=1)
            features[f"norm{index}"] = nn.BatchNorm2d(width)
            features[f"relu{index}"] = nn.ReLU(inplace=True)
            c_in, index = width, index + 1
        self.features = nn.Sequential(features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(c_in, 512),
                norm1=nn.BatchNorm1d(512),
                relu1=nn.ReLU(inplace=True),
                dropout=nn.Dropout(0.0),
                linear2=nn.Linear(512, num_classes),
            )
        )
        initialise_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
