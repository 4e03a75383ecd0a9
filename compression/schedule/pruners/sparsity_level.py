"""Element-wise pruning to a given sparsity: exactly the requested number of elements is pruned, smallest magnitudes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compression.schedule.pruners.counts import level_mask
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from utils.options import by_parameter, number, option


@dataclass
class SparsityLevelParameterPruner(Pruner):
    """Prunes floor(level * elements) of each weight; of equal magnitudes, the first ones are pruned first.

    Attributes:
        levels: fraction to prune, by parameter; '*' is the default of the other weights. A policy may replace it.
    """

    levels: Mapping[str, float] = option(by_parameter(number(least=0, below=1)))

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.levels)

    def decide(self, task: PruningTask) -> Decision:
        levels = self.levels.items()
        return Decision({name: level_mask(task.weights[name], task.masks.get(name), level) for name, level in levels})

    def target(self, moment: Moment) -> float | None:
        levels = set(self.levels.values())
        return levels.pop() if len(levels) == 1 else None
