"""Rank filters by the scale of the batch norm that follows them, Network Slimming (arXiv:1708.06519): score = |gamma|.

Train with an L1Regularizer on the scales first. Differs: the paper applies one threshold to all layers; here each weight (or
group of weights) is pruned to its given sparsity.
"""

from __future__ import annotations

from compression.schedule.pruners.criterion_ranked import CriterionRankedPruner


class BatchNormScaleRankedPruner(CriterionRankedPruner):
    """Prunes the filters with the smallest absolute batch-norm scale."""

    criterion = "bn_scale"
