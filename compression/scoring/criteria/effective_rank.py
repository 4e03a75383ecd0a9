"""Effective rank of the feature map (Roy & Vetterli, EUSIPCO 2007).

score(c) = mean over images of exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j, sigma the singular values of the
channel's map as its readers see it; 0 for a map of zeros.

Differs: the paper defines the quantity, not a pruning score. It takes the place of HRank's matrix rank where activations
are never exactly zero (SiLU, GELU), so that every map has full rank.
"""

from __future__ import annotations

from compression.scoring.measuring import score_by_ranks
from compression.scoring.scores import NetworkScores, ScoringTask


def effective_rank(task: ScoringTask) -> NetworkScores:
    """Score by the mean effective rank."""
    return score_by_ranks(task, "effective_rank")
