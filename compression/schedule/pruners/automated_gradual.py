"""Automated gradual pruning, element-wise (arXiv:1710.01878, equation 1): see ``gradual`` for the formula."""

from __future__ import annotations

from dataclasses import dataclass

from compression.schedule.pruners.counts import by_level
from compression.schedule.pruners.gradual import check_growth, gradual
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from utils.options import number, option, parameters


@dataclass
class AutomatedGradualPruner(Pruner):
    """Prunes the smallest magnitudes to a sparsity that grows from one asking to the next.

    Attributes:
        initial_sparsity: at the first asking.
        final_sparsity: at the last one; it may equal the initial one.
        weights: what is pruned.
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
        return Decision({name: by_level(task.weights[name], task.masks.get(name), level) for name in self.weights})

    def target(self, moment: Moment) -> float | None:
        return float(gradual(self.initial_sparsity, self.final_sparsity, moment))
