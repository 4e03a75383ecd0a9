"""Distance to the geometric median (FPGM, arXiv:1811.00250).

score(c) = sum over the filters c' of the layer of ||w_c - w_c'||_2: the filter of the smallest sum lies nearest to the
geometric median of all, so the others can stand in for it.

Differs: where several layers make the channels together, each layer's sums are divided by their mean and averaged.
"""

from __future__ import annotations

from torch import Tensor

from compression.scoring.scores import NetworkScores, ScoringTask, score_weights


def fpgm(task: ScoringTask) -> NetworkScores:
    """Score by the filters' summed distances to the others."""

    def distances(rows: Tensor) -> Tensor:
        lengths = rows.square().sum(1)
        squares = lengths[:, None] + lengths - 2 * rows @ rows.T
        return squares.fill_diagonal_(0).clamp_min(0).sqrt().sum(1)

    return score_weights(task, distances)
