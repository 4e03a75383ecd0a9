"""L2 norm of the filter (the variant that arXiv:1608.08710 compares with).

score(c) = sqrt(sum over the filter's weights of w^2).

Differs: where several layers make the channels together, each layer's norms are divided by their mean and averaged.
"""

from __future__ import annotations

from compression.scoring.scores import NetworkScores, ScoringTask, score_weights


def l2(task: ScoringTask) -> NetworkScores:
    """Score by the filters' Euclidean norms."""
    return score_weights(task, lambda filters: filters.norm(dim=1))
