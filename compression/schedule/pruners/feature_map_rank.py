"""Filters ranked by the rank of their feature maps, HRank under a schedule (arXiv:2002.10179): score = mean over images of rank."""

from __future__ import annotations

from compression.schedule.pruners.measured_ranked import ByCriterion
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByRank(ByCriterion):
    """Scores filters by the mean matrix rank of their feature maps."""

    criterion = "rank"


class FeatureMapRankFilterPruner(ByRank, AtOnce):
    """Prunes the filters of the lowest mean feature-map rank."""


class FeatureMapRankFilterPrunerAGP(ByRank, Gradual):
    """Prunes the filters of the lowest mean feature-map rank, more and more of them."""
