"""What the readers of a channel lose with it after the best refit of their other weights (arXiv:2208.11580, arXiv:2302.04089).

Units go one after the other, each time the one that costs least: the mean squared error of the outputs of all weights that
read it, each as a share of its outputs' variance, summed. Then the readers' weights are refitted and the costs of the other
units change. score(c) = the error summed up to the removal of c.

Differs: the readers' errors are weighted by their outputs' variance and not by the loss's second derivatives. On ResNet-56 the
Fisher information chose worse (docs/results.md, "How the defaults were chosen"). In groups of more than
``STEPS`` units several go at a time. A group that no convolution or linear layer reads is scored by the norm of its filters.
"""

from __future__ import annotations

import torch

from compression.layers.readers import Reader, measure_readers, readers_of
from compression.scoring.criteria.l2 import l2
from compression.scoring.scores import GroupScore, NetworkScores, ScoringTask
from compression.tracing.graph import ChannelGroup

STEPS = 64


def reconstruction(task: ScoringTask) -> NetworkScores:
    """Score by the readers' squared error after the best refit."""
    moments = measure_readers(task.model, task.graph, (inputs for inputs, _ in task.images.batches()), task.seed, len(task.images))
    scores, norms = {}, l2(task).groups
    for group in task.graph.prunable:
        readers = readers_of(group, task.graph.shapes, moments)
        scores[group.name] = _score(group, readers, len(task.images)) if readers else norms[group.name]
    return NetworkScores(scores, readers=moments)


def _score(group: ChannelGroup, readers: list[Reader], images: int) -> GroupScore:
    left = [unit for unit in range(group.size) if unit not in group.fixed]
    values = torch.zeros(group.size, dtype=torch.float64)
    spent, at_once = 0.0, max(group.size // STEPS, 1)
    while left:
        losses = torch.stack([reader.losses(left) for reader in readers]).sum(0)
        going = [left[place] for place in losses.argsort(stable=True)[:at_once].tolist()]
        for unit, loss in zip(going, losses.sort(stable=True).values.tolist(), strict=False):
            spent += max(loss, 0.0)
            values[unit] = spent
        for reader in readers:
            reader.remove_(going)
        left = [unit for unit in left if unit not in going]
    values[list(group.fixed)] = spent
    return GroupScore.of([values], images)
