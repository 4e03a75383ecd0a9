"""Average percentage of zeros (APoZ, arXiv:1607.03250).

score(c) = 1 - APoZ(c), APoZ(c) the share of the channel's values, over positions and images, that are not positive.

Differs: the paper counts zeros after ReLU. A value that is not positive counts as zero, which is the same after ReLU and
means something after SiLU or GELU too, whose values are small where they are negative.
"""

from __future__ import annotations

from compression.scoring.scores import NetworkScores, ScoringTask, score_maps


def apoz(task: ScoringTask) -> NetworkScores:
    """Score by the share of positive values."""
    return score_maps(task, lambda maps: (maps > 0).float().mean((2, 3))[None])
