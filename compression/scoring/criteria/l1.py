"""L1 norm of the filter (arXiv:1608.08710).

score(c) = sum over the filter's weights of |w|.

Differs: where several layers make the channels together, each layer's norms are divided by their mean and averaged; the
paper takes one of the layers.
"""

from __future__ import annotations

from compression.scoring.scores import NetworkScores, ScoringTask, score_weights


def l1(task: ScoringTask) -> NetworkScores:
    """Score by the filters' L1 norms."""
    return score_weights(task, lambda filters: filters.abs().sum(1))
