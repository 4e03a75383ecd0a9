"""Rank filters by their mean activation (arXiv:1611.06440, section 2.2): score = mean |activation| over images and positions."""

from __future__ import annotations

from compression.schedule.pruners.criterion_ranked import CriterionRankedPruner


class ActivationMeanRankedPruner(CriterionRankedPruner):
    """Prunes the filters with the lowest mean absolute activation."""

    criterion = "mean_activation"
