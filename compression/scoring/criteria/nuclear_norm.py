"""Nuclear norm of the feature map: the sum of its singular values.

score(c) = mean over images of sum_i sigma_i of the channel's map [H, W] as its readers see it.

Differs: no paper prunes by this alone; it is what CHIP (arXiv:2110.13981) takes of a layer, taken of a single map. Unlike
the rank it grows with the map's scale.
"""

from __future__ import annotations

from compression.scoring.measuring import measure_ranks
from compression.scoring.network_scores import NetworkScores
from compression.scoring.ranks import scores_from_ranks
from compression.scoring.scores import Task


def nuclear_norm(task: Task) -> NetworkScores:
    """Score by the mean nuclear norm."""
    maps = measure_ranks(task, "nuclear_norm")
    return NetworkScores(scores_from_ranks(maps, task.graph, "nuclear_norm"), maps)
