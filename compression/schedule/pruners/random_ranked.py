"""Rank filters at random: the control that any ranking method must beat. score ~ U(0, 1), drawn anew at every decision."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, drawn


class RandomRankedPruner(RankedPruner):
    """Prunes random filters."""

    kinds = FILTERS

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: drawn(torch.rand, self.view(name, task.weights[name])[:, 0], task) for name in names}
