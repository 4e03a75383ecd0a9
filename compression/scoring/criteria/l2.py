"""L2 norm of the filter (the variant that arXiv:1608.08710 compares with).

score(c) = sqrt(sum over the filter's weights of w^2).

Differs: where several layers make the channels together, each layer's norms are divided by their mean and averaged.
"""

from __future__ import annotations

from torch import Tensor

from compression.scoring.network_scores import NetworkScores
from compression.scoring.scores import GroupScore, Task, from_weights


def l2(task: Task) -> NetworkScores:
    """Score by the filters' Euclidean norms."""

    def norms(rows: Tensor) -> Tensor:
        return rows.norm(dim=1)

    return NetworkScores({group.name: GroupScore.of([from_weights(task.model, group, norms)]) for group in task.graph.prunable})
