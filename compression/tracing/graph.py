"""What a trace says of a network: its channel groups, and which positions of which tensors a keep-set leaves."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compression.tracing.record import Contraction, Key, Route, Slots, TraceRecord
from compression.tracing.tracer import run_traced
from utils.errors import UserError

Keep = Mapping[str, Collection[int]]  # a group's name -> the units that are kept


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group runs through.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: its dimension.
        positions: positions along it, int64 [n].
        units: the group's unit at each of them, int64 [n].
        role: "producer" (makes the channels), "reader" (a weight that reads them) or "follower" (norms, biases).
    """

    tensor: str
    dim: int
    positions: Tensor
    units: Tensor
    role: str


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut by one keep-set. What lives or dies together is one *unit*: mostly one channel.

    Attributes:
        name: the module that first makes the channels.
        size: number of units.
        channels: channels of the first producer.
        members: everything that carries them.
        fixed: units that must stay.
        reason: why nothing can be cut; empty where something can.
        macs: multiply-adds of the weights that make or read these channels.
    """

    name: str
    size: int
    channels: int
    members: tuple[Member, ...]
    fixed: frozenset[int]
    reason: str
    macs: int

    @property
    def prunable(self) -> bool:
        """Whether any unit can go."""
        return not self.reason

    @property
    def producers(self) -> list[Member]:
        """The members that make the channels."""
        return [member for member in self.members if member.role == "producer"]

    @property
    def readers(self) -> list[Member]:
        """The weights that read the channels."""
        return [member for member in self.members if member.role == "reader"]


@dataclass
class ChannelGraph:
    """A network's channel groups, in forward order of their first producers, and what surgery needs to know.

    Attributes:
        groups: all of them, those that can't be cut too.
        contractions: calls of convolutions and matrix products, in forward order, with group and unit per channel.
        shapes: of all tensors.
        component: node -> number of what lives or dies with it.
    """

    groups: tuple[ChannelGroup, ...]
    contractions: list[Contraction]
    shapes: dict[str, tuple[int, ...]]
    record: TraceRecord
    component: NDArray[np.int64]
    units: dict[int, tuple[str, int]]
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups that can be cut."""
        return [group for group in self.groups if group.prunable]

    @property
    def routes(self) -> list[Route]:
        """Gathers by buffers."""
        return self.record.routes

    def group(self, name: str) -> ChannelGroup:
        """Return a group by its name."""
        return next(group for group in self.groups if group.name == name)

    def removed(self, keep: Keep) -> NDArray[np.bool_]:
        """Return, for each component, whether it goes. Groups that are not named stay whole.

        Raises:
            UserError: a group or unit is not there, must stay, or nothing of a group would be left.
        """
        gone = np.zeros(self.record.count, dtype=bool)
        groups = {group.name: group for group in self.groups}
        kept: dict[str, set[int]] = {}
        for name, chosen in keep.items():
            if name not in groups:
                raise UserError(f"this network has no channel group '{name}'")
            group, kept[name] = groups[name], set(chosen)
            if not kept[name] <= set(range(group.size)):
                raise UserError(f"group '{name}' has {group.size} units; the keep-set names others")
            if len(kept[name]) < group.size and not group.prunable:
                raise UserError(f"group '{name}' can't be cut: {group.reason}")
            if not kept[name] or not group.fixed <= kept[name]:
                raise UserError(f"group '{name}' must keep at least one unit and those that are fixed")
        for component, (name, unit) in self.units.items():
            gone[component] = name in kept and unit not in kept[name]
        return gone

    def indices(self, keep: Keep) -> dict[str, dict[int, Tensor]]:
        """Return, for each tensor that changes, the kept positions along each dimension that changes."""
        gone = self.removed(keep)
        found: dict[str, dict[int, Tensor]] = {}
        for (name, dim), nodes in self.record.bases.items():
            stays = ~gone[self.component[nodes.numpy()]]
            if not stays.all():
                found.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(stays))
        return found

    def macs(self, keep: Keep, indices: Mapping[str, Mapping[int, Tensor]] | None = None) -> int:
        """Return the multiply-adds, for one image, of the weights that the trace met, under a keep-set."""
        indices = self.indices(keep) if indices is None else indices
        return sum(c.repeats * self._numel(c.weight, indices) for c in self.contractions)

    def params(self, keep: Keep, names: Iterable[str], indices: Mapping[str, Mapping[int, Tensor]] | None = None) -> int:
        """Return the elements of the named tensors under a keep-set."""
        indices = self.indices(keep) if indices is None else indices
        return sum(self._numel(name, indices) for name in names)

    def _numel(self, name: str, indices: Mapping[str, Mapping[int, Tensor]]) -> int:
        cut = indices.get(name, {})
        return math.prod(len(cut[dim]) if dim in cut else size for dim, size in enumerate(self.shapes[name]))


def read_graph(model: nn.Module, inputs: Tensor, levels: dict[Key, int], barred: Mapping[Slots, str]) -> ChannelGraph:
    """Trace once, with given readings of the sites and given slots pinned; nothing is proved."""
    record = TraceRecord.of(model, levels)
    run_traced(model, inputs, record)
    for (name, dim), reason in barred.items():
        record.pin(record.nodes(name, dim), reason)
    component = record.components()
    fixed: dict[int, str] = {}
    for node in sorted(record.reasons):
        fixed.setdefault(int(component[node]), record.reasons[node])
    groups, units = _bundle(record, component, fixed)
    shapes = {name: tuple(tensor.shape) for name, tensor in record.owned.values()}
    return ChannelGraph(groups, record.contractions, shapes, record, component, units)


def _bundle(
    record: TraceRecord, component: NDArray[np.int64], fixed: Mapping[int, str]
) -> tuple[tuple[ChannelGroup, ...], dict[int, tuple[str, int]]]:
    """Bundle components that run through the same dimensions of the same tensors, in the order of their making."""
    slots: dict[int, list[tuple[Slots, int]]] = {}
    for key, nodes in record.bases.items():
        for position, number in enumerate(component[nodes.numpy()].tolist()):
            slots.setdefault(number, []).append((key, position))
    order: dict[int, tuple[int, int]] = {}
    for place, contraction in enumerate(record.contractions):
        for rank, number in enumerate(component[contraction.out.numpy()].tolist()):
            order.setdefault(number, (place, rank))
    bundles: dict[frozenset[Slots], list[int]] = {}
    for number in sorted((n for n in slots if n in order), key=order.__getitem__):
        bundles.setdefault(frozenset(key for key, _ in slots[number]), []).append(number)
    groups: list[ChannelGroup] = []
    units: dict[int, tuple[str, int]] = {}
    names: dict[str, int] = {}
    for members in bundles.values():
        first = record.contractions[order[members[0]][0]]
        name = first.module or first.weight
        names[name] = names.get(name, 0) + 1
        name += f"#{names[name]}" if names[name] > 1 else ""
        units |= {number: (name, unit) for unit, number in enumerate(members)}
        groups.append(_group(record, name, first, members, slots, fixed, component))
    return tuple(groups), units


def _group(
    record: TraceRecord,
    name: str,
    first: Contraction,
    numbers: list[int],
    slots: Mapping[int, list[tuple[Slots, int]]],
    fixed: Mapping[int, str],
    component: NDArray[np.int64],
) -> ChannelGroup:
    places: dict[Slots, list[tuple[int, int]]] = {}
    for unit, number in enumerate(numbers):
        for key, position in slots[number]:
            places.setdefault(key, []).append((position, unit))
    members = []
    for key, found in places.items():
        role = "producer" if key in record.producers else "reader" if key in record.readers else "follower"
        positions, of_unit = (torch.tensor(column) for column in zip(*sorted(found), strict=True))
        members.append(Member(*key, positions, of_unit, role))
    stuck = frozenset(unit for unit, number in enumerate(numbers) if number in fixed)
    reason = ""
    if len(stuck) == len(numbers):
        reason = fixed[numbers[0]]
    elif len(numbers) == 1:
        reason = "its channels live or die together, and one must stay"
    channels = int(np.isin(component[first.out.numpy()], numbers).sum())
    touched = {member.tensor for member in members if member.role != "follower"}
    by_name = dict(record.owned.values())
    macs = sum(c.repeats * by_name[c.weight].numel() for c in record.contractions if c.weight in touched)
    return ChannelGroup(name, len(numbers), channels, tuple(members), stuck, reason, macs)
