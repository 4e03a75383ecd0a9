"""Rank of the feature map (HRank, arXiv:2002.10179).

score(c) = mean over images of rank(o_c), o_c [H, W] the channel's map as its readers see it, after the activation.

Differs: ties are broken by the effective rank, then by the nuclear norm; all layers are scored in one pass over the
same images, with the transforms of evaluation; where channels are tied together, the mean over all maps that carry them.
"""

from __future__ import annotations

from compression.scoring.measuring import score_by_ranks
from compression.scoring.scores import NetworkScores, ScoringTask


def rank(task: ScoringTask) -> NetworkScores:
    """Score by the mean matrix rank."""
    return score_by_ranks(task, "rank")
