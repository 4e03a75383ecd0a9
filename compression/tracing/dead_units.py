"""Units of channel groups that masks have emptied: no weight makes them any more, or none reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression.tracing.graph import ChannelGraph, ChannelGroup, Member


def dead_units(graph: ChannelGraph, alive: Mapping[str, Tensor], role: str, by_leader: bool = False, least: int = 1) -> dict[str, set[int]]:
    """Return, for each prunable group, the units that no weight carries any more.

    Args:
        graph: the channel groups.
        alive: which elements of each tensor are not zero.
        role: "producer": all weights that make the unit are zero; "reader": all that read it are.
        by_leader: only the first of these weights is asked; what the others carry goes with it.
        least: so many units are left out at least, first those of which most elements are not zero.
    """
    gathers = {route.buffer for route in graph.routes}  # they hold positions, not weights
    members = {group.name: [m for m in group.members if m.role == role and m.tensor not in gathers] for group in graph.prunable}
    carried = {group.name: _carried(group, members[group.name], alive) for group in graph.prunable}
    if by_leader:
        members = {name: [m for m in found if m.tensor == found[0].tensor] for name, found in members.items()}
    living = {group.name: torch.full((group.size,), not members[group.name], dtype=torch.bool) for group in graph.prunable}
    for name, found in members.items():
        for member in found:
            living[name][member.units[_of_units(member, alive).bool()]] = True
    _revive_through_routes(graph, living, role)
    dead = {}
    for group in graph.prunable:
        gone = set((~living[group.name]).nonzero().flatten().tolist()) - group.fixed
        strongest = sorted(gone, key=lambda unit: (-carried[group.name][unit], unit))
        gone -= set(strongest[: max(least - (group.size - len(gone)), 0)])
        if gone:
            dead[group.name] = gone
    return dead


def _carried(group: ChannelGroup, members: Sequence[Member], alive: Mapping[str, Tensor]) -> list[int]:
    """Return how many elements of these weights are alive, for each unit."""
    counts = torch.zeros(group.size, dtype=torch.long)
    for member in members:
        counts.index_add_(0, torch.as_tensor(member.units), _of_units(member, alive))
    return counts.tolist()


def _of_units(member: Member, alive: Mapping[str, Tensor]) -> Tensor:
    """Return how many elements of a weight are alive, for each of the units that it has."""
    return alive[member.tensor].cpu().movedim(member.dim, 0).unsqueeze(-1).flatten(1).sum(1)[member.positions]


def _revive_through_routes(graph: ChannelGraph, living: dict[str, Tensor], role: str) -> None:
    """Mark the units that a gather (an option-A shortcut) still feeds from a living one, or reads for one, in place."""
    for route in graph.routes if role == "producer" else reversed(graph.routes):
        made = graph.component[graph.record.slot_nodes[route.buffer, 0]].tolist()
        read = graph.component[route.read].tolist()
        for target, source in zip(made, (route.index % len(read)).tolist(), strict=True):
            if source == route.zero:
                continue
            ends = graph.units.get(target), graph.units.get(read[source])
            unit, other = ends if role == "producer" else reversed(ends)
            if unit and unit[0] in living and (other is None or other[0] not in living or bool(living[other[0]][other[1]])):
                living[unit[0]][unit[1]] = True


def follower_masks(graph: ChannelGraph, dead: Mapping[str, set[int]], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks of the biases and norms that follow dead units, so that their channels are zero behind the norm too."""
    masks: dict[str, Tensor] = {}
    for name, units in dead.items():
        gone = torch.zeros(graph.group(name).size, dtype=torch.bool)
        gone[list(units)] = True
        for member in graph.group(name).members:
            if member.role == "follower" and member.tensor in parameters and parameters[member.tensor].ndim == 1:
                mask = masks.setdefault(member.tensor, torch.ones_like(parameters[member.tensor], requires_grad=False))
                mask[member.positions[gone[member.units]].to(mask.device)] = 0.0
    return masks
