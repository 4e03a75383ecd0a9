"""Filters in a drawn order: the control that a method of ranking must beat. score ~ U(0, 1), anew at every asking."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, drawn
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByChance(RankedPruner):
    """Scores filters by what is drawn."""

    kinds = FILTERS

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: drawn(torch.rand, self.view(name, task.weights[name])[:, 0], task) for name in names}


class RandomRankedFilterPruner(ByChance, AtOnce):
    """Prunes filters by chance."""


class RandomRankedFilterPrunerAGP(ByChance, Gradual):
    """Prunes filters by chance, more and more of them."""
