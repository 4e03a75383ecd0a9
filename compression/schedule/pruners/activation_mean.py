"""Filters ranked by their mean activation (arXiv:1611.06440, section 2.2): score = mean over images and places of |activation|."""

from __future__ import annotations

from compression.schedule.pruners.measured_ranked import ByCriterion
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByMeanActivation(ByCriterion):
    """Scores filters by their mean absolute activation."""

    criterion = "mean_activation"


class ActivationMeanRankedFilterPruner(ByMeanActivation, AtOnce):
    """Prunes the filters of the lowest mean absolute activation."""


class ActivationMeanRankedFilterPrunerAGP(ByMeanActivation, Gradual):
    """Prunes the filters of the lowest mean absolute activation, more and more of them."""
