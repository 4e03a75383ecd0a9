"""How sure a difference between two classifiers on the same images is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairedDifference:
    """What one classifier loses against another on the same images.

    Attributes:
        drop: the share of the images that it loses: those that only the first has right, less those that only the second has.
        standard_error: of the drop, if the images are a sample.
        lost, won: images that only the first has right, and only the second.
        flips: the share of the images on which one is right and the other wrong.
        p_value: of McNemar's test, exact, that both are equally good (Psychometrika 12, 1947).
    """

    drop: float
    standard_error: float
    lost: int
    won: int
    flips: float
    p_value: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> PairedDifference:
        """Compare which images each has right: bool [N] in the same order."""
        count = len(first)
        lost, won = int((first & ~second).sum()), int((~first & second).sum())
        drop = (lost - won) / count
        error = math.sqrt(max((lost + won) / count - drop**2, 0.0) / count)
        fewer, both = min(lost, won), lost + won
        tail = sum(math.exp(_log_choose(both, k) - both * math.log(2)) for k in range(fewer + 1))
        return cls(drop, error, lost, won, both / count, min(2 * tail, 1.0))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
