"""Rank of the feature map (HRank, arXiv:2002.10179).

score(c) = mean over images of rank(o_c), o_c [H, W] the channel's map as its readers see it, after the activation.

Differs: ties are broken by the effective rank, then by the nuclear norm; all layers are scored in one pass over the
same images, with the transforms of evaluation; where channels are tied together, the mean over all maps that carry them.
"""

from __future__ import annotations

from compression.scoring.measuring import measure_ranks
from compression.scoring.network_scores import NetworkScores
from compression.scoring.ranks import scores_from_ranks
from compression.scoring.scores import Task


def rank(task: Task) -> NetworkScores:
    """Score by the mean matrix rank."""
    maps = measure_ranks(task, "rank")
    return NetworkScores(scores_from_ranks(maps, task.graph, "rank"), maps)
