"""Rank structures by Euclidean norm (arXiv:1608.08710): score = sqrt(sum of w^2 over the structure)."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import RankedPruner


class L2RankedPruner(RankedPruner):
    """Prunes the structures with the lowest Euclidean norm."""

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: torch.linalg.vector_norm(self.view(name, task.weights[name]).float(), dim=1) for name in names}
