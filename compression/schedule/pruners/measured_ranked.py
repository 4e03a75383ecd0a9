"""Filters ranked by a criterion that measures the network (see ``compression.scoring.criteria``)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compression.schedule.pruners.pruner import PruningTask
from compression.schedule.pruners.ranked import FILTERS, RankedPruner, covered


class ByCriterion(RankedPruner):
    """Scores filters by a criterion, on calibration images where it needs some.

    Attributes:
        criterion: its name.
    """

    kinds = FILTERS
    criterion: ClassVar[str]

    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = covered(task.filter_scores(self.criterion), names, f"score '{self.criterion}'")
        return {name: scores.to(task.weights[name].device) for name, scores in found.items()}
