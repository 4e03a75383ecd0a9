"""Structures ranked by their Euclidean norm (arXiv:1608.08710): score = sqrt(sum over the structure of w^2)."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import RankedPruner
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByNorm(RankedPruner):
    """Scores structures by their Euclidean norm."""

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: torch.linalg.vector_norm(self.view(name, task.weights[name]).float(), dim=1) for name in names}


class L2RankedStructureParameterPruner(ByNorm, AtOnce):
    """Prunes the structures of the lowest Euclidean norm."""


class L2RankedStructureParameterPrunerAGP(ByNorm, Gradual):
    """Prunes the structures of the lowest Euclidean norm, more and more of them."""
