"""Mean activation (arXiv:1611.06440, section 2.2, "Activation").

score(c) = mean over positions and images of |o_c|, o_c the channel's map as its readers see it.

Differs: the paper has ReLU networks, where the absolute value changes nothing.
"""

from __future__ import annotations

from torch import Tensor

from compression.scoring.network_scores import NetworkScores
from compression.scoring.scores import Task, score_means


def mean_activation(task: Task) -> NetworkScores:
    """Score by the mean absolute activation."""

    def size(maps: Tensor) -> Tensor:
        return maps.abs().mean((2, 3))[None]

    return NetworkScores(score_means(task, size))
