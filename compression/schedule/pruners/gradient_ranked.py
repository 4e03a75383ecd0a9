"""Filters ranked by what the loss would change without them, to first order (arXiv:1611.06440, on weights).

score = |sum over the filter of w dL/dw|
"""

from __future__ import annotations

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, covered
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByGradient(RankedPruner):
    """Scores filters by their first-order effect on the loss."""

    kinds = FILTERS

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        gradients = covered(task.gradients(names), names, "gradient")
        return {name: self.view(name, task.weights[name] * gradients[name]).sum(1).abs() for name in names}


class GradientRankedFilterPruner(ByGradient, AtOnce):
    """Prunes the filters of the least first-order effect on the loss."""


class GradientRankedFilterPrunerAGP(ByGradient, Gradual):
    """Prunes the filters of the least first-order effect on the loss, more and more of them."""
