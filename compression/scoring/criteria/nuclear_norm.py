"""Nuclear norm of the feature map: the sum of its singular values.

score(c) = mean over images of sum_i sigma_i of the channel's map [H, W] as its readers see it.

Differs: no paper prunes by this alone; it is what CHIP (arXiv:2110.13981) takes of a layer, taken of a single map. Unlike
the rank it grows with the map's scale.
"""

from __future__ import annotations

from compression.scoring.measuring import score_by_ranks
from compression.scoring.scores import NetworkScores, ScoringTask


def nuclear_norm(task: ScoringTask) -> NetworkScores:
    """Score by the mean nuclear norm."""
    return score_by_ranks(task, "nuclear_norm")
