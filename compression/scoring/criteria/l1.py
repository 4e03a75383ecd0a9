"""L1 norm of the filter (arXiv:1608.08710).

score(c) = sum over the filter's weights of |w|.

Differs: where several layers make the channels together, each layer's norms are divided by their mean and averaged; the
paper takes one of the layers.
"""

from __future__ import annotations

from torch import Tensor

from compression.scoring.network_scores import NetworkScores
from compression.scoring.scores import GroupScore, Task, from_weights


def l1(task: Task) -> NetworkScores:
    """Score by the filters' L1 norms."""

    def norms(rows: Tensor) -> Tensor:
        return rows.abs().sum(1)

    return NetworkScores({group.name: GroupScore.of([from_weights(task.model, group, norms)]) for group in task.graph.prunable})
