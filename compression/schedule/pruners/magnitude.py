"""Element-wise pruning with a given threshold: keep |w| > t."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compression.schedule.pruners.counts import magnitude_mask
from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from utils.options import by_parameter, number, option


@dataclass
class MagnitudeParameterPruner(Pruner):
    """Keeps the elements whose magnitude is above a threshold.

    Attributes:
        thresholds: by parameter; '*' is the default of the other weights.
    """

    thresholds: Mapping[str, float] = option(by_parameter(number(least=0)))

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.thresholds)

    def decide(self, task: PruningTask) -> Decision:
        return Decision({name: magnitude_mask(task.weights[name], threshold) for name, threshold in self.thresholds.items()})
