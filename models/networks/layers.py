"""The layers of YOLOv5's classifiers, with YOLOv5's state-dict keys.

Every layer takes its widths as arguments and reads none in ``forward``, so that any width can be cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def round_up(value: float, divisor: int = 8) -> int:
    """Round up to a multiple of ``divisor``."""
    return int(-(-value // divisor) * divisor)


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU if ``act``. Shapes: [B, c_in, H, W] -> [B, c_out, H/s, W/s]."""

    def __init__(self, c_in: int, c_out: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Conv to ``c_hidden`` with a kernel of ``first``, 3x3 conv to ``c_out``, plus the input if ``add``.

    ``add`` is stored, never inferred from the widths: if they do not match, the network must fail, not drop the shortcut.
    """

    def __init__(self, c_in: int, c_hidden: int, c_out: int, add: bool, first: int = 1) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_hidden, first)
        self.cv2 = Conv(c_hidden, c_out, 3)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Cross-stage partial block: cv3(cat(m(cv1(x)), cv2(x))), with ``m`` a chain of bottlenecks.

    Args:
        c_in, c_out: channels of the input and the output.
        c_main: channels of cv1, then of every bottleneck's output; all equal if the bottlenecks add their input.
        c_skip: channels of cv2.
        c_hidden: channels inside each bottleneck.
        shortcut: whether the bottlenecks add their input.
    """

    def __init__(self, c_in: int, c_out: int, c_main: tuple[int, ...], c_skip: int, c_hidden: tuple[int, ...], shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_main[0])
        self.cv2 = Conv(c_in, c_skip)
        self.cv3 = Conv(c_main[-1] + c_skip, c_out)
        widths = zip(c_main, c_hidden, c_main[1:], strict=False)
        self.m = nn.Sequential(*(Bottleneck(before, hidden, after, add=shortcut) for before, hidden, after in widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class SPPF(nn.Module):
    """Fast spatial pyramid pooling (arXiv:1406.4729): three 5x5 max pools in a row, all four maps concatenated."""

    def __init__(self, c_in: int, c_out: int, c_hidden: int, k: int = 5) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_hidden)
        self.cv2 = Conv(c_hidden * 4, c_out)
        self.m = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, dim=1))


class Concat(nn.Module):
    """Concatenate several feature maps along the channels."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, dim=1)


class Classify(nn.Module):
    """Conv to ``c_hidden`` channels, global average pool, dropout, linear. Shapes: [B, c_in, H, W] -> [B, num_classes]."""

    def __init__(self, c_in: int, num_classes: int, c_hidden: int = 1280) -> None:
        super().__init__()
        self.conv = Conv(c_in, c_hidden)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.0)
        self.linear = nn.Linear(c_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.pool(self.conv(x)).flatten(1)))
