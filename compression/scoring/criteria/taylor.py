"""First-order Taylor expansion of the loss (arXiv:1906.10771, its gate of equation 8).

score(c) = mean over batches of (sum over the weights w that read channel c of w * dL/dw)^2, L the cross-entropy.

The sum is dL/dg of a gate g = 1 that multiplies the channel before its readers, so g * dL/dg is the first-order change
of the loss when the channel goes.

Differs: the gate stands before the readers, wherever the channel is made, and gradients are taken in eval mode without
an update of the weights in between; batches have 16 images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.scoring.feature_maps import deal, gather
from compression.scoring.scores import GroupScore, NetworkScores, ScoringTask
from compression.tracing.graph import ChannelGroup
from compression.tracing.record import owned_tensors
from compression.tracing.tracer import evaluating


def taylor(task: ScoringTask) -> NetworkScores:
    """Score by the squared change of the loss, to first order."""
    groups = task.graph.prunable
    names = list(dict.fromkeys(member.tensor for group in groups for member in group.readers))
    owned = dict(owned_tensors(task.model).values())
    weights = [owned[name] for name in names]
    wanted = [weight.requires_grad for weight in weights]
    mine: dict[int, dict[str, Tensor]] = {}
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(task.model), torch.enable_grad():
            for number, (inputs, labels) in deal(task.images):
                device = weights[0].device
                loss = F.cross_entropy(task.model(inputs.to(device)), labels.to(device))
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                products = {
                    name: (weight.detach() * gradient).double().cpu()
                    for name, weight, gradient in zip(names, weights, gradients, strict=True)
                    if gradient is not None
                }
                mine[number] = {group.name: _of_gates(group, products) for group in groups}
    finally:
        for weight, flag in zip(weights, wanted, strict=True):
            weight.requires_grad_(flag)
    batches = gather(mine)
    scores = {}
    for group in groups:
        values = torch.stack([batches[number][group.name].square() for number in sorted(batches)]).mean(0)
        scores[group.name] = GroupScore.of([values], len(task.images))
    return NetworkScores(scores)


def _of_gates(group: ChannelGroup, products: dict[str, Tensor]) -> Tensor:
    """Return dL/dg for the gate of each unit, from w * dL/dw of the weights."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.readers:
        if member.tensor in products:
            product = products[member.tensor].movedim(member.dim, 0).flatten(1).sum(1)
            total.index_add_(0, member.units, product[member.positions])
    return total
