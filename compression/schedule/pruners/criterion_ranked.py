"""Base of the pruners that rank filters by a criterion of ``compression.scoring.criteria``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, covered


class CriterionRankedPruner(RankedPruner):
    """Scores filters by the criterion of this name, on calibration images if the criterion needs them."""

    kinds = FILTERS
    criterion: ClassVar[str]

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = covered(task.filter_scores(self.criterion), names, f"score '{self.criterion}'")
        return {name: scores.to(task.weights[name].device) for name, scores in found.items()}
