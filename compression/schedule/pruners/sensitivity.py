"""Element-wise pruning by the standard deviation of the weights (arXiv:1506.02626): keep |w| > s * std(w)."""

from __future__ import annotations

from dataclasses import dataclass

from compression.schedule.pruners.counts import magnitude_mask
from compression.schedule.pruners.pruner import Decision, PruningTask
from compression.schedule.pruners.statistics_pruner import StatisticsPruner


@dataclass
class SensitivityPruner(StatisticsPruner):
    """Keeps the elements whose magnitude is above a multiple of the standard deviation.

    The deviation is that of the weights at the first decision, before any pruning: the remaining weights spread more.
    """

    def decide(self, task: PruningTask) -> Decision:
        weights = {name: task.weights[name] for name in self.sensitivities}
        thresholds = {name: self.sensitivities[name] * self.deviation(name, weight) for name, weight in weights.items()}
        return Decision({name: magnitude_mask(weight, thresholds[name]) for name, weight in weights.items()})
