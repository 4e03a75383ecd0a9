"""The clipping range of an activation, from its statistics; ACIQ (arXiv:1810.05723, section 3).

With M bits and a clip at alpha, the expected squared error of clipping and rounding is least if

- Laplace(b):    alpha / b     solves  x e^x = 3 * 4^M,
- Gauss(sigma):  alpha / sigma solves  x (1 - erf(x / sqrt 2)) + x / (3 * 4^M) = sqrt(2 / pi) e^(-x^2 / 2).

An activation that is never negative is treated as a distribution around zero that ReLU has cut in half: half the grid's
steps would be unused, so M is increased by one, and sigma^2 = 2 E[x^2], b = 2 E[x].

Differs: the equations are solved here; the paper tabulates the solutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

CLIPS = ("none", "avg", "n_std", "gauss", "laplace")


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of a layer's input.

    Attributes:
        min, max: of all values.
        avg_min, avg_max: means over images of an image's extremes.
        mean, std: of all values.
        b: mean distance from the mean.
    """

    min: float
    max: float
    avg_min: float
    avg_max: float
    mean: float
    std: float
    b: float


def clip_range(clip: str, measured: InputStatistics, bits: int, n_stds: float = 2.0) -> tuple[float, float]:
    """Return the range that is kept, within the smallest and the largest measured value.

    Args:
        clip: one of ``CLIPS``: "none" keeps all, "avg" the images' mean extremes, "n_std" mean +- n_stds * std.
        measured: statistics of the input.
        bits: of its grid.
        n_stds: the number of standard deviations for "n_std".
    """
    if clip == "avg":
        return measured.avg_min, measured.avg_max
    if clip == "none":
        return measured.min, measured.max
    half = measured.min >= 0
    if clip == "n_std":
        centre, reach = measured.mean, n_stds * measured.std
    elif clip == "gauss":
        sigma = math.sqrt(2 * (measured.std**2 + measured.mean**2)) if half else measured.std
        centre, reach = 0.0 if half else measured.mean, gauss_clip(bits + half) * sigma
    else:
        centre, reach = 0.0 if half else measured.mean, laplace_clip(bits + half) * (2 * measured.mean if half else measured.b)
    return max(centre - reach, measured.min), min(centre + reach, measured.max)


def laplace_clip(bits: int) -> float:
    """Return alpha / b; 2.83, 3.90, 5.03 for 2, 3, 4 bits."""
    return _root(lambda x: x * math.exp(x) - 3 * 4**bits)


def gauss_clip(bits: int) -> float:
    """Return alpha / sigma; 1.71, 2.15, 2.56 for 2, 3, 4 bits."""
    return _root(lambda x: x * math.erfc(x / math.sqrt(2)) + x / (3 * 4**bits) - math.sqrt(2 / math.pi) * math.exp(-x * x / 2))


def _root(function: Callable[[float], float]) -> float:
    """Return the root of a function that is negative at 0 and positive at 30, by bisection."""
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
