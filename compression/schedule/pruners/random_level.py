"""Prune by mean magnitude to a random sparsity, drawn anew at every decision: s ~ U(low, high).

A network trained this way tolerates many sparsities, so that one network shows the sensitivity of each layer (the
preparation for AMC, arXiv:1802.03494).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.schedule.pruners.l1_ranked import L1RankedPruner
from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import drawn
from compression.schedule.pruners.sparsities import SPARSITY
from utils.errors import UserError
from utils.options import listed, option


@dataclass(kw_only=True)
class RandomLevelStructureParameterPruner(L1RankedPruner):
    """Prunes a random fraction of the structures, those with the lowest mean magnitude.

    Each weight has its own level; with ``group_dependency``, all weights share one.

    Attributes:
        sparsity_range: [low, high].
    """

    sparsity_range: tuple[float, float] = option(listed(SPARSITY, 2))

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.sparsity_range
        if high < low:
            raise UserError(f"sparsity_range must be [low, high], not [{low:g}, {high:g}]")

    def level(self, name: str, task: PruningTask) -> float:
        low, high = self.sparsity_range
        return low + (high - low) * drawn(torch.rand, torch.empty(()), task).item()
