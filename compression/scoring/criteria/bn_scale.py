"""Scale of batch normalisation (Network Slimming, arXiv:1708.06519).

score(c) = |gamma_c|.

Differs: the paper trains with an L1 penalty on gamma first and compares channels of all layers; here the network is taken
as it is and compared within a group. Where several batch norms carry the channels, each one's scales are divided by
their mean and averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from compression.scoring.scores import GroupScore, NetworkScores, ScoringTask, mean_by_unit, mean_over_members, relative
from compression.tracing.graph import ChannelGroup
from utils.errors import UserError


def bn_scale(task: ScoringTask) -> NetworkScores:
    """Score by the scales of batch norms.

    Raises:
        UserError: a group has no batch norm with a scale.
    """
    scales = {
        f"{name}.weight" if name else "weight": module.weight.detach().cpu().abs()
        for name, module in task.model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
    return NetworkScores({group.name: _score(group, scales) for group in task.graph.prunable})


def _score(group: ChannelGroup, scales: Mapping[str, Tensor]) -> GroupScore:
    found = [
        relative(mean_by_unit(scales[member.tensor][member.positions], member.units, group.size))
        for member in group.members
        if member.tensor in scales
    ]
    if not found:
        raise UserError(
            f"criterion 'bn_scale' can't score group '{group.name}': it has no batch norm with a scale; exclude the group, or choose l1"
        )
    return GroupScore.of([mean_over_members(found)])
