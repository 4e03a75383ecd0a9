"""Rank structures by mean magnitude (arXiv:1608.08710): score = mean |w| over the structure."""

from __future__ import annotations

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import RankedPruner


class L1RankedPruner(RankedPruner):
    """Prunes the structures with the lowest mean magnitude."""

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: self.view(name, task.weights[name]).float().abs().mean(1) for name in names}
