"""The layers of YOLOv8's and YOLO11's classifiers, with their state-dict keys: blocks that split channels, and attention.

As in ``layers``, no width is read in ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.networks.layers import C3, Bottleneck, Conv

HEAD_CHANNELS = 64  # of an attention head's values; keys and queries have half as many


class Pair(Bottleneck):
    """Two 3x3 convs, plus the input if ``add``: the bottleneck of YOLOv8."""

    def __init__(self, c: int, c_hidden: int, add: bool) -> None:
        super().__init__(c, c_hidden, c, add, first=3)


class C3k(C3):
    """A C3 whose ``m`` is two pairs of 3x3 convs."""

    def __init__(self, c: int, add: bool) -> None:
        half = c // 2
        super().__init__(c, c, (half,), half, (), add)
        self.m = nn.Sequential(*(Pair(half, half, add) for _ in range(2)))


class C2f(nn.Module):
    """Half of cv1's channels pass through a chain of blocks; cv2 reads both halves and what every block puts out.

    Args:
        c_in, c_out: channels of the input and the output.
        c_hidden: of each half.
        blocks: the chain; each keeps the number of channels.
    """

    def __init__(self, c_in: int, c_out: int, c_hidden: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, 2 * c_hidden)
        self.cv2 = Conv((2 + len(blocks)) * c_hidden, c_out)
        self.m = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            maps.append(block(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class Attention(nn.Module):
    """Self-attention over positions, and a depthwise conv of the values as positional encoding. [B, c, H, W] -> the same."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.values = heads, c // heads
        self.keys = self.values // 2
        self.qkv = Conv(c, c + 2 * self.keys * heads, act=False)
        self.proj = Conv(c, c, act=False)
        self.pe = Conv(c, c, 3, g=c, act=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1))
        queries, keys, values = parts.split([self.keys, self.keys, self.values], dim=2)
        weights = ((queries.transpose(-2, -1) @ keys) * self.keys**-0.5).softmax(-1)
        seen, size = (values @ weights.transpose(-2, -1)).flatten(1, 2), x.shape[2:]
        return self.proj(seen.unflatten(2, size) + self.pe(values.flatten(1, 2).unflatten(2, size)))


class AttentionBlock(nn.Module):
    """Attention, then two 1x1 convs, each added to what it reads."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.attn = Attention(c, max(c // HEAD_CHANNELS, 1))
        self.ffn = nn.Sequential(Conv(c, 2 * c), Conv(2 * c, c, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    """Half of cv1's channels pass through attention blocks; cv2 reads both halves."""

    def __init__(self, c: int, blocks: int) -> None:
        super().__init__()
        half = c // 2
        self.cv1 = Conv(c, 2 * half)
        self.cv2 = Conv(2 * half, c)
        self.m = nn.Sequential(*(AttentionBlock(half) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        kept, attended = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((kept, self.m(attended)), 1))
