"""Structures ranked by their mean magnitude (arXiv:1608.08710): score = mean over the structure of |w|."""

from __future__ import annotations

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import RankedPruner
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByMagnitude(RankedPruner):
    """Scores structures by their mean magnitude."""

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: self.view(name, task.weights[name]).float().abs().mean(1) for name in names}


class L1RankedStructureParameterPruner(ByMagnitude, AtOnce):
    """Prunes the structures of the lowest mean magnitude."""


class L1RankedStructureParameterPrunerAGP(ByMagnitude, Gradual):
    """Prunes the structures of the lowest mean magnitude, more and more of them."""
