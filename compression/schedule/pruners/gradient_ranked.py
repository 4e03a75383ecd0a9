"""Rank filters by how much the loss would change without them, to first order (arXiv:1611.06440, applied to weights).

score = |sum of w dL/dw over the filter|
"""

from __future__ import annotations

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, covered


class GradientRankedPruner(RankedPruner):
    """Prunes the filters with the smallest first-order effect on the loss."""

    kinds = FILTERS

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        gradients = covered(task.gradients(names), names, "gradient")
        return {name: self.view(name, task.weights[name] * gradients[name]).sum(1).abs() for name in names}
