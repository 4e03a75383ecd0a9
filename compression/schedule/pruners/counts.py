"""Masks by threshold and by exact count."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def exact(level: float | Fraction) -> Fraction:
    """Return a level as the decimal written in the file: 0.29 of 100 is 29, where floating point gives 28."""
    return level if isinstance(level, Fraction) else Fraction(str(level))


def share(level: float | Fraction, count: int) -> int:
    """Return floor(level * count)."""
    return int(exact(level) * count)


def without_lowest(values: Tensor, count: int) -> Tensor:
    """Return a bool tensor of the shape of ``values`` that is False at exactly ``count`` of the lowest.

    Among equal values the first ones are chosen. Linear time on a CPU.
    """
    flat = values.flatten()
    if count <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    if count >= flat.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    # kthvalue on a GPU is refused when deterministic algorithms are required, and sorting is cheap there
    edge = flat.kthvalue(count).values if flat.is_cpu else flat.sort().values[count - 1]
    keep = flat > edge
    tied = (flat == edge).nonzero().flatten()
    keep[tied[count - int((flat < edge).sum()) :]] = True
    return keep.view_as(values)


def magnitude_mask(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Return a mask that keeps |w| > threshold."""
    return (weight.abs() > threshold).to(weight.dtype)


def level_mask(weight: Tensor, mask: Tensor | None, level: float | Fraction) -> Tensor:
    """Return a mask that prunes exactly floor(level * elements) of the smallest magnitudes of a weight.

    Zeros that ``mask`` hides are pruned before other zeros, so that pruning to the same level again changes nothing.
    """
    magnitudes = weight.abs()
    if mask is not None:
        magnitudes = magnitudes.masked_fill((mask == 0) & (magnitudes == 0), -1)
    return without_lowest(magnitudes, share(level, weight.numel())).to(weight.dtype)
