"""Scale of batch normalisation (Network Slimming, arXiv:1708.06519).

score(c) = |gamma_c|.

Differs: the paper trains with an L1 penalty on gamma first and compares channels of all layers; here the network is taken
as it is and compared within a group. Where several batch norms carry the channels, each one's scales are divided by
their mean and averaged.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression.scoring.network_scores import NetworkScores
from compression.scoring.scores import GroupScore, Task, by_unit, mean_of, relative
from compression.tracing.graph import ChannelGroup
from compression.tracing.record import owned_tensors
from utils.errors import UserError


def bn_scale(task: Task) -> NetworkScores:
    """Score by the scales of batch norms.

    Raises:
        UserError: a group has no batch norm with a scale.
    """
    scales = {name for name, tensor in owned_tensors(task.model).values() if isinstance(tensor, nn.Parameter)} & {
        f"{name}.weight" if name else "weight" for name, module in task.model.named_modules() if isinstance(module, _BatchNorm)
    }
    return NetworkScores({group.name: _score(task.model, group, scales) for group in task.graph.prunable})


def _score(model: nn.Module, group: ChannelGroup, scales: set[str]) -> GroupScore:
    owned = dict(owned_tensors(model).values())
    found = []
    for member in group.members:
        if member.tensor in scales:
            gamma = owned[member.tensor].detach().cpu().abs()
            found.append(relative(by_unit(gamma[member.positions], member.units, group.size)))
    if not found:
        raise UserError(
            f"criterion 'bn_scale' can't score group '{group.name}': it has no batch norm with a scale; leave it out, or take l1"
        )
    return GroupScore.of([mean_of(found)])
