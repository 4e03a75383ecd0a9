"""Mean activation (arXiv:1611.06440, section 2.2, "Activation").

score(c) = mean over positions and images of |o_c|, o_c the channel's map as its readers see it.

Differs: the paper has ReLU networks, where the absolute value changes nothing.
"""

from __future__ import annotations

from compression.scoring.scores import NetworkScores, ScoringTask, score_maps


def mean_activation(task: ScoringTask) -> NetworkScores:
    """Score by the mean absolute activation."""
    return score_maps(task, lambda maps: maps.abs().mean((2, 3))[None])
