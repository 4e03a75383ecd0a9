"""Structures ranked by mean magnitude, pruned to a sparsity that is drawn anew at every asking: s ~ U(low, high).

Networks that learn under it stand many sparsities, so that each layer's sensitivity can be read off one network (the
preparation of AMC, arXiv:1802.03494).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.schedule.pruners.l1_ranked import ByMagnitude
from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import drawn
from compression.schedule.pruners.targets import SPARSITY
from utils.errors import UserError
from utils.options import listed, option


@dataclass(kw_only=True)
class RandomLevelStructureParameterPruner(ByMagnitude):
    """Prunes a drawn fraction of the structures, those of the lowest mean magnitude.

    Each weight has a level of its own, with ``group_dependency`` all have one.

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
