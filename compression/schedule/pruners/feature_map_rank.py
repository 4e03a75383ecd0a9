"""Rank filters by the rank of their feature maps, HRank under a schedule (arXiv:2002.10179): score = mean rank over images."""

from __future__ import annotations

from compression.schedule.pruners.criterion_ranked import CriterionRankedPruner


class FeatureMapRankedPruner(CriterionRankedPruner):
    """Prunes the filters whose feature maps have the lowest mean matrix rank."""

    criterion = "rank"
