"""Element-wise pruning to a given sparsity: the smallest magnitudes go, exactly as many as are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compression.schedule.pruners.counts import by_level
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from utils.options import by_parameter, number, option


@dataclass
class SparsityLevelParameterPruner(Pruner):
    """Prunes floor(level * elements) of each weight; ties go by position.

    Attributes:
        levels: fraction that goes, by parameter; '*' is the default of the other weights. A policy may replace it.
    """

    levels: Mapping[str, float] = option(by_parameter(number(least=0, below=1)))

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.levels)

    def decide(self, task: PruningTask) -> Decision:
        levels = self.levels.items()
        return Decision({name: by_level(task.weights[name], task.masks.get(name), level) for name, level in levels})

    def target(self, moment: Moment) -> float | None:
        levels = set(self.levels.values())
        return levels.pop() if len(levels) == 1 else None
