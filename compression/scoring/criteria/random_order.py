"""Random scores, seeded: the control that every other criterion must beat.

score(c) ~ U[0, 1), drawn for each group from (seed, the group's number).
"""

from __future__ import annotations

import numpy as np
import torch

from compression.scoring.scores import GroupScore, NetworkScores, ScoringTask


def random_order(task: ScoringTask) -> NetworkScores:
    """Score at random."""
    scores = {}
    for number, group in enumerate(task.graph.groups):
        if group.prunable:
            drawn = np.random.default_rng([task.seed, number]).random(group.size)
            scores[group.name] = GroupScore.of([torch.from_numpy(drawn)])
    return NetworkScores(scores)
