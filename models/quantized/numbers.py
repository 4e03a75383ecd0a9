"""The arithmetic of quantization: grids, rounding to them, and straight-through gradients.

A grid holds the values scale * (q - zero_point) for the integers q in low..high (arXiv:1712.05877, equation 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
SLACK = 1e-3  # of a step: a range's own end must not fall outside because of a division's last bit


@dataclass(frozen=True)
class Grid:
    """Scale and zero point are scalars, or one per channel and broadcastable; low and high are the limits of q."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def limits(bits: int, mode: str) -> tuple[int, int]:
    """Return the least and the greatest integer; for 8 bits: sym and asym_s -128..127, sym_restr -127..127, asym_u 0..255."""
    half = 2 ** (bits - 1)
    return {"sym": (-half, half - 1), "sym_restr": (1 - half, half - 1), "asym_s": (-half, half - 1), "asym_u": (0, 2 * half - 1)}[mode]


def grid_of(low: Tensor, high: Tensor, bits: int, mode: str) -> Grid:
    """Return the grid of a range of values; zero is always on it.

    Symmetric, with m = max(|low|, |high|): scale = m / ((2^bits - 1) / 2), restricted m / (2^(bits-1) - 1); zero
    point 0. Asymmetric: scale = (high - low) / (2^bits - 1), zero point = round(lowest q - low / scale). The scale of an
    empty range is 1.

    Args:
        low, high: ends of the range, scalars or one per channel.
        bits: 2 or more.
        mode: one of ``MODES``.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    first, last = limits(bits, mode)
    if mode in ("sym", "sym_restr"):
        scale = torch.maximum(-low, high) / (last if mode == "sym_restr" else (2**bits - 1) / 2)
    else:
        scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    if mode in ("sym", "sym_restr"):
        return Grid(scale, torch.zeros_like(scale), first, last)
    return Grid(scale, (first - low / scale).round(), first, last)


def range_of(values: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value: of all, or of each slice of dimension 0, broadcastable to ``values``."""
    values = values.detach()
    if not per_channel or values.ndim < 2:
        low, high = values.aminmax()
        return low, high
    dims = tuple(range(1, values.ndim))
    return values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)


def quantize(values: Tensor, grid: Grid) -> Tensor:
    """Return the integers q = clamp(round(values / scale) + zero_point); halves round to even."""
    return ((values / grid.scale).round() + grid.zero_point).clamp(grid.low, grid.high)


def dequantize(numbers: Tensor, grid: Grid) -> Tensor:
    """Return scale * (q - zero_point)."""
    return (numbers - grid.zero_point) * grid.scale


def _taped(*tensors: Tensor) -> bool:
    """Whether gradients are recorded; otherwise the plain operations run, which every exporter understands."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Fake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        exact = values / scale + zero_point
        ctx.save_for_backward((exact >= low - 0.5 - SLACK) & (exact <= high + 0.5 + SLACK))
        grid = Grid(scale, zero_point, low, high)
        return dequantize(quantize(values, grid), grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def fake_quantize(values: Tensor, grid: Grid) -> Tensor:
    """Round to a grid; gradients pass where a value lies within its range and are zero elsewhere (arXiv:1308.3432)."""
    if _taped(values):
        result: Tensor = _Fake.apply(values, grid.scale, grid.zero_point, grid.low, grid.high)
        return result
    return dequantize(quantize(values, grid), grid)


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.strides = values.stride()
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        told = zip(gradient.shape, gradient.stride(), ctx.strides, strict=True)
        same = all(size == 1 or ours == theirs for size, ours, theirs in told)
        return gradient.as_strided(gradient.shape, ctx.strides) if same else gradient


def laid_out(values: Tensor) -> Tensor:
    """Return a weight whose gradient will have its own strides.

    In a dimension of size 1, as a grey image's stem has, strides are ambiguous; a gradient with others makes DDP warn.
    """
    result: Tensor = _LaidOut.apply(values) if _taped(values) else values
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def levels(values: Tensor, count: int) -> Tensor:
    """Round to multiples of 1 / count; the gradient is that of the identity.

    DoReFa's Q_k (arXiv:1606.06160, equation 5) is ``levels(values, 2^k - 1)`` of values in [0, 1].
    """
    rounded: Tensor = _Round.apply(values * count) if _taped(values) else (values * count).round()
    return rounded / count


def _clipped(values: Tensor, alpha: Tensor, count: int) -> Tensor:
    clipped = values.clamp(min=0.0).minimum(alpha)
    return (clipped * (count / alpha)).round() * (alpha / count) if count else clipped


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, alpha: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(values, alpha)
        return _clipped(values, alpha, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        values, alpha = ctx.saved_tensors
        above = values >= alpha
        by_alpha = (gradients[0] * above).sum().reshape(alpha.shape)
        return gradients[0] * ((values >= 0) & ~above), by_alpha, None


def pact(values: Tensor, alpha: Tensor, bits: int | None) -> Tensor:
    """Clip to [0, alpha] and round to 2^bits levels (arXiv:1805.06085, equations 1 and 2).

    The gradient of alpha is the sum of the gradients where values >= alpha (equation 3); no rounding without bits.
    """
    count = 2**bits - 1 if bits else 0
    clipped: Tensor = _Pact.apply(values, alpha, count) if _taped(values, alpha) else _clipped(values, alpha, count)
    return clipped


def dorefa_image(weight: Tensor, bits: int) -> Tensor:
    """Return DoReFa's image of weights: 2 Q_k(tanh w / (2 max|tanh w|) + 1/2) - 1 (arXiv:1606.06160, equation 9).

    For 1 bit: sign(w) * mean|w| (equation 7).

    Differs: zero stays zero. The levels are odd, so that the paper's image of a pruned weight is 1 / (2^k - 1).
    """
    if bits == 1:
        signs = weight.detach().sign()
        return _straight(weight, signs * weight.detach().abs().mean())
    squashed = torch.tanh(weight)
    peak = squashed.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    image = 2 * levels(squashed / (2 * peak) + 0.5, 2**bits - 1) - 1
    return image - image.detach() * (weight.detach() == 0)


def wrpn_image(weight: Tensor, bits: int) -> Tensor:
    """Return WRPN's image of weights: clamped to [-1, 1], 2^(k-1) - 1 positive levels (arXiv:1709.01134, section 5)."""
    clamped = torch.where(weight.abs() <= 1, weight, weight.detach().sign())  # clamp's gradient at 1 itself may be zero
    return levels(clamped, 2 ** (bits - 1) - 1)


def _straight(values: Tensor, image: Tensor) -> Tensor:
    """Return an image whose gradient goes to the values unchanged."""
    return image + (values - values.detach())


IMAGES: dict[str, Callable[[Tensor, int], Tensor]] = {"dorefa": dorefa_image, "wrpn": wrpn_image}  # beside the linear grids
