"""A network's channel groups, and what a choice of channels leaves of its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compression.tracing.record import OUTPUT, CallKey, Contraction, Route, TensorDim, TraceRecord, owned_tensors
from compression.tracing.tracer import run_traced
from utils.errors import UserError

Keep = Mapping[str, Collection[int]]  # a keep-set: group name -> the units that are kept; other groups stay whole
Indices = dict[str, dict[int, Tensor]]  # tensor -> dimension -> the kept positions, where some go


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
    """Channels that are chosen among together. What lives or dies as one is a *unit*: mostly a single channel.

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

    @property
    def makers(self) -> list[str]:
        """The modules that make the channels."""
        return list(dict.fromkeys(member.tensor.rpartition(".")[0] for member in self.producers))


@dataclass
class ChannelGraph:
    """A network's channel groups, in forward order of their first producers, and what surgery needs to know.

    Attributes:
        groups: all of them, also those that can't be cut.
        shapes: of all parameters and buffers.
        record: the trace.
        component: int64 [nodes]: the component of each node, which is the smallest of the nodes that are tied.
        units: component -> its group's name and its unit there.
    """

    groups: tuple[ChannelGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    record: TraceRecord
    component: Tensor
    units: dict[int, tuple[str, int]]

    @property
    def prunable(self) -> list[ChannelGroup]:
        """The groups that can be cut."""
        return [group for group in self.groups if group.prunable]

    @property
    def reasons(self) -> list[str]:
        """Why something stays whole, most frequent first: the groups' reasons, and those of layers that are in no group."""
        of_groups = [group.reason for group in self.groups if group.reason and group.reason != OUTPUT]
        return [reason for reason, _ in Counter([*of_groups, *self.record.unfollowed.values()]).most_common()]

    @property
    def contractions(self) -> list[Contraction]:
        """Calls of convolutions and matrix products, in forward order."""
        return self.record.contractions

    @property
    def routes(self) -> list[Route]:
        """Gathers by buffers, in forward order."""
        return self.record.routes

    def group(self, name: str) -> ChannelGroup:
        """Return a group by its name."""
        return next(group for group in self.groups if group.name == name)

    def removed(self, keep: Keep) -> Tensor:
        """Return whether each node goes: bool [nodes].

        Raises:
            UserError: a group or unit does not exist, must stay, or nothing of a group would be left.
        """
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
        gone = torch.zeros(self.record.count, dtype=torch.bool)
        for component, (name, unit) in self.units.items():
            gone[component] = name in kept and unit not in kept[name]
        return gone[self.component]

    def indices(self, keep: Keep) -> Indices:
        """Return the kept positions along each dimension that loses some."""
        gone = self.removed(keep)
        found: Indices = {}
        for (name, dim), nodes in self.record.slot_nodes.items():
            if gone[nodes].any():
                found.setdefault(name, {})[dim] = (~gone[nodes]).nonzero().reshape(-1)
        return found

    def macs(self, keep: Keep) -> int:
        """Return the multiply-adds, for one image, of the weights and the heads that the trace met, under a keep-set."""
        indices, gone = self.indices(keep), self.removed(keep)
        of_weights = sum(contraction.repeats * self.numel(contraction.weight, indices) for contraction in self.contractions)
        return of_weights + sum(each * int((~gone[nodes]).sum()) for nodes, each in self.record.products)

    def params(self, keep: Keep, names: Iterable[str]) -> int:
        """Return the elements of the named tensors under a keep-set."""
        indices = self.indices(keep)
        return sum(self.numel(name, indices) for name in names)

    def numel(self, name: str, indices: Indices) -> int:
        """Return the elements that are left of a tensor."""
        cut = indices.get(name, {})
        return math.prod(len(cut[dim]) if dim in cut else size for dim, size in enumerate(self.shapes[name]))


def read_graph(
    model: nn.Module, inputs: Tensor, readings: dict[CallKey, int], pinned: Mapping[TensorDim, str], heads: Collection[CallKey] = ()
) -> ChannelGraph:
    """Trace once, with the given readings of the sites and the given dimensions pinned; nothing is proved.

    Args:
        heads: the sites that split channels into heads of which whole ones go.
    """
    record = TraceRecord(owned_tensors(model), readings, heads=set(heads))
    run_traced(model, inputs, record)
    for (name, dim), reason in pinned.items():
        record.pin(record.nodes(name, dim), reason)
    component = record.components()
    fixed: dict[int, str] = {}
    for node in sorted(record.reasons):
        fixed.setdefault(int(component[node]), record.reasons[node])
    groups, units = _find_groups(record, component, fixed)
    return ChannelGraph(groups, {name: tuple(tensor.shape) for name, tensor in record.by_name.items()}, record, component, units)


def _find_groups(
    record: TraceRecord, component: Tensor, fixed: Mapping[int, str]
) -> tuple[tuple[ChannelGroup, ...], dict[int, tuple[str, int]]]:
    """Bundle components that run through the same dimensions of the same tensors, in the order in which they are made."""
    slots: dict[int, list[tuple[TensorDim, int]]] = {}  # component -> its slots
    for tensor_dim, nodes in record.slot_nodes.items():
        for position, number in enumerate(component[nodes].tolist()):
            slots.setdefault(number, []).append((tensor_dim, position))
    order: dict[int, tuple[int, int]] = {}  # component -> the contraction that makes it first, and its place among the outputs
    for place, contraction in enumerate(record.contractions):
        for rank, number in enumerate(component[contraction.out].tolist()):
            order.setdefault(number, (place, rank))
    bundles: dict[frozenset[TensorDim], list[int]] = {}
    for number in sorted(slots.keys() & order.keys(), key=order.__getitem__):
        bundles.setdefault(frozenset(tensor_dim for tensor_dim, _ in slots[number]), []).append(number)
    groups: list[ChannelGroup] = []
    units: dict[int, tuple[str, int]] = {}
    names: Counter[str] = Counter()
    for numbers in bundles.values():
        first = record.contractions[order[numbers[0]][0]]
        name = first.module or first.weight
        names[name] += 1
        name += f"#{names[name]}" if names[name] > 1 else ""
        units |= {number: (name, unit) for unit, number in enumerate(numbers)}
        members = _members(record, [slots[number] for number in numbers])
        groups.append(
            ChannelGroup(
                name,
                size=len(numbers),
                channels=int(torch.isin(component[first.out], torch.tensor(numbers)).sum()),
                members=members,
                fixed=frozenset(unit for unit, number in enumerate(numbers) if number in fixed),
                reason=_reason_to_stay(numbers, fixed),
                macs=_macs_of(record, members),
            )
        )
    return tuple(groups), units


def _members(record: TraceRecord, slots_of_units: list[list[tuple[TensorDim, int]]]) -> tuple[Member, ...]:
    places: dict[TensorDim, list[tuple[int, int]]] = {}
    for unit, slots in enumerate(slots_of_units):
        for tensor_dim, position in slots:
            places.setdefault(tensor_dim, []).append((position, unit))
    members = []
    for tensor_dim, found in places.items():
        role = "producer" if tensor_dim in record.producers else "reader" if tensor_dim in record.readers else "follower"
        positions, units = torch.tensor(sorted(found)).T.contiguous()
        members.append(Member(*tensor_dim, positions, units, role))
    return tuple(members)


def _reason_to_stay(numbers: list[int], fixed: Mapping[int, str]) -> str:
    if all(number in fixed for number in numbers):
        return fixed[numbers[0]]
    return "its channels live or die together, and one must stay" if len(numbers) == 1 else ""


def _macs_of(record: TraceRecord, members: Iterable[Member]) -> int:
    """Return the multiply-adds of the weights that make or read a group's channels."""
    weights = {member.tensor for member in members if member.role != "follower"}
    return sum(
        contraction.repeats * record.by_name[contraction.weight].numel()
        for contraction in record.contractions
        if contraction.weight in weights
    )
