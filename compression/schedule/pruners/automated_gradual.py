"""Automated gradual pruning, element-wise (arXiv:1710.01878, equation 1); the formula is in ``gradual``."""

from __future__ import annotations

from dataclasses import dataclass

from compression.schedule.pruners.counts import level_mask
from compression.schedule.pruners.gradual import check_growth, gradual
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from utils.options import number, option, parameters


@dataclass
class AutomatedGradualPruner(Pruner):
    """Prunes the smallest magnitudes to a sparsity that grows with every decision.

    Attributes:
        initial_sparsity: at the first decision.
        final_sparsity: at the last one; not below the initial one.
        weights: the parameters to prune.
    """

    initial_sparsity: float = option(number(least=0, below=1))
    final_sparsity: float = option(number(least=0, below=1))
    weights: tuple[str, ...] = option(parameters)

    def __post_init__(self) -> None:
        check_growth(self.initial_sparsity, self.final_sparsity)

    def parameters(self) -> tuple[str, ...]:
        return self.weights

    def decide(self, task: PruningTask) -> Decision:
        level = gradual(self.initial_sparsity, self.final_sparsity, task.moment)
        return Decision({name: level_mask(task.weights[name], task.masks.get(name), level) for name in self.weights})

    def target(self, moment: Moment) -> float | None:
        return float(gradual(self.initial_sparsity, self.final_sparsity, moment))
