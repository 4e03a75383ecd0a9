"""Filters that are dropped by chance while the network learns (DropFilter).

Each filter goes with probability p, independently; the mask of those that stay is divided by their share, to make up for
what is dropped. Masks are drawn anew at every asking, so the schedule must keep a second copy (``use_double_copies``).

Differs: one filter always stays.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, drawn
from compression.schedule.pruners.targets import AtOnce, Gradual
from utils.errors import UserError


class ByCoin(RankedPruner):
    """Draws a number in [0, 1) for each filter; those below the level go."""

    kinds = FILTERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_dependency == "Average" or self.group_size != 1 or self.noise:
            raise UserError("filters go independently of each other: no group_dependency Average, group_size or noise")

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: drawn(torch.rand, self.view(name, task.weights[name])[:, 0], task) for name in names}

    def kept(self, scores: Tensor, empty: Tensor, level: float | Fraction, task: PruningTask) -> Tensor:
        stays = scores >= float(level)
        if not stays.any():
            stays = scores == scores.max()
        return stays / stays.double().mean()


class BernoulliFilterPruner(ByCoin, AtOnce):
    """Drops filters by chance."""


class BernoulliFilterPrunerAGP(ByCoin, Gradual):
    """Drops filters by chance, more and more of them."""
