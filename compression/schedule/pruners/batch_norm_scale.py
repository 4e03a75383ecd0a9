"""Filters ranked by the scale of the batch norm behind them, Network Slimming (arXiv:1708.06519): score = |gamma|.

Train with an L1Regularizer on the scales first. Differs: the paper has one threshold over all layers; here each weight (or
group of weights) loses the share that it is told to.
"""

from __future__ import annotations

from compression.schedule.pruners.measured_ranked import ByCriterion
from compression.schedule.pruners.targets import AtOnce, Gradual


class ByBatchNormScale(ByCriterion):
    """Scores filters by the absolute scale of their batch norm."""

    criterion = "bn_scale"


class BatchNormScaleRankedFilterPruner(ByBatchNormScale, AtOnce):
    """Prunes the filters of the lowest batch-norm scale."""


class BatchNormScaleRankedFilterPrunerAGP(ByBatchNormScale, Gradual):
    """Prunes the filters of the lowest batch-norm scale, more and more of them."""
