"""Rank filters by how often their activations are positive (arXiv:1607.03250): score = 1 - average percentage of zeros."""

from __future__ import annotations

from compression.schedule.pruners.criterion_ranked import CriterionRankedPruner


class ActivationAPoZRankedPruner(CriterionRankedPruner):
    """Prunes the filters with the lowest share of positive activations."""

    criterion = "apoz"
