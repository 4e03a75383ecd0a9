"""Filters ranked by how often their activations are positive (arXiv:1607.03250): score = 1 - average percentage of zeros."""

from __future__ import annotations

from compression.schedule.pruners.measured_ranked import ByCriterion
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByApoz(ByCriterion):
    """Scores filters by the share of their activations that are positive."""

    criterion = "apoz"


class ActivationAPoZRankedFilterPruner(ByApoz, AtOnce):
    """Prunes the filters of the lowest share of positive activations."""


class ActivationAPoZRankedFilterPrunerAGP(ByApoz, Gradual):
    """Prunes the filters of the lowest share of positive activations, more and more of them."""
