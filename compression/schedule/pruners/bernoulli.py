"""Drop random filters while the network trains (DropFilter).

Each filter is dropped with probability p, independently of the others; the mask of the remaining filters is divided by their
share, to compensate for the dropped ones. Masks are drawn anew at every decision, so the schedule must keep a second copy of
the weights (``use_double_copies``).

Differs: at least one filter is always kept.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.random_ranked import RandomRankedPruner
from utils.errors import UserError


class BernoulliPruner(RandomRankedPruner):
    """Drops the filters whose random score is below the sparsity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_dependency == "Average" or self.group_size != 1 or self.noise:
            raise UserError("each filter is dropped independently: no group_dependency Average, group_size or noise")

    def kept(self, scores: Tensor, empty: Tensor, level: float | Fraction, task: PruningTask) -> Tensor:
        stays = scores >= float(level)
        if not stays.any():
            stays = scores == scores.max()
        return stays / stays.double().mean()
