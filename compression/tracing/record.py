"""What a trace records: which slots of which tensors carry the same channel, and which channels must stay.

A *slot* is one position along one dimension of a parameter or buffer. A *node* is the number of a slot, or of a channel
that no tensor owns (the network's input, a padded zero). Tied nodes live or die together; pinned nodes stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

TensorDim = tuple[str, int]  # (name of a parameter or buffer, dimension)
CallKey = tuple[str, str, int]  # the module, the operation, and its number among equal ones there
T = TypeVar("T")
OUTPUT = "the network's output"  # a reason to stay


class Mismatch(Exception):
    """A shrunk network does not receive the channels that it should."""


@dataclass
class Contraction:
    """One call of a convolution or matrix product with a weight of the network.

    Attributes:
        weight: the weight's name.
        module: where it was called.
        out, read: the channels that it makes and reads, as nodes.
        groups: of a grouped convolution.
        repeats: multiply-adds per element of the weight.
        tap: the number of the computed tensor that shows the channels made as their readers see them: the last one of
            the same size that norms, activations and additions alone lead to before anything else reads it.
        spatial: whether that tensor is a stack of maps [B, C, H, W]; otherwise its channels lie along the last axis.
    """

    weight: str
    module: str
    out: Tensor
    read: Tensor
    groups: int
    repeats: int
    tap: int
    spatial: bool


@dataclass
class Route:
    """A gather along the channels by an integer buffer: output j is input ``buffer[j]``.

    Attributes:
        buffer: its name.
        read: the input's channels, as nodes.
        index: the buffer's values.
        zero: the input position that is constantly zero and stands in for what is removed; None where a removed input
            takes its outputs with it.
    """

    buffer: str
    read: Tensor
    index: Tensor
    zero: int | None


@dataclass
class TraceRecord:
    """The record of one trace.

    Attributes:
        owned: the network's parameters and buffers by identity, see ``owned_tensors``.
        readings: for each site, the reading to take (see ``rules``).
        slot_nodes: the nodes along each dimension that was met.
        producers, readers: the dimensions along which weights make and read channels.
        whole_groups: for the weight of each grouped convolution, whether whole groups go, or the same positions of each.
        norm_groups: for each norm, its number of groups and the channels that it normalises; a batch norm has as many
            groups as channels.
        sites: the nodes that pass each site.
        reasons: why a node is pinned.
        fresh_nodes: the nodes that no tensor owns, call by call.
        splits: for each site that splits channels over axes, its nodes and the size of its last axis.
        heads: those of them that split into the heads of an attention, [.., heads, channels of one]: whole heads go there.
        asked: those that an attention needs to be among ``heads``, or else its channels must stay.
        unfollowed: convolutions and matrix products that no rule covers, and why, by the module in which they are.
        products: products of activations: the nodes that they are taken for, and the multiply-adds of each.
        head_counts: for each module with such a site, its number of heads and their nodes.
        decisions: what the rules decided from where channels vary; a shrunk network repeats it.
        zeros: the nodes of channels that are constantly zero.
        ties: pairs of equally long vectors of nodes.
        count: how many nodes there are.
        at_hand: where the network did not run to its end, the channels that it had at hand.
    """

    owned: dict[int, tuple[str, Tensor]]
    readings: dict[CallKey, int] = field(default_factory=dict)
    slot_nodes: dict[TensorDim, Tensor] = field(default_factory=dict)
    producers: set[TensorDim] = field(default_factory=set)
    readers: set[TensorDim] = field(default_factory=set)
    contractions: list[Contraction] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    whole_groups: dict[str, bool] = field(default_factory=dict)
    norm_groups: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    sites: dict[CallKey, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    fresh_nodes: list[Tensor] = field(default_factory=list)
    splits: dict[CallKey, tuple[Tensor, int]] = field(default_factory=dict)
    heads: set[CallKey] = field(default_factory=set)
    asked: set[CallKey] = field(default_factory=set)
    unfollowed: dict[str, str] = field(default_factory=dict)
    products: list[tuple[Tensor, int]] = field(default_factory=list)
    head_counts: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    decisions: dict[tuple[CallKey, str], Any] = field(default_factory=dict)
    zeros: set[int] = field(default_factory=set)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    count: int = 0
    at_hand: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        self.by_name = dict(self.owned.values())

    def nodes(self, name: str, dim: int) -> Tensor:
        """Return the nodes along a tensor's dimension."""
        if (name, dim) not in self.slot_nodes:
            self.slot_nodes[name, dim] = self._number(self.by_name[name].shape[dim])
        return self.slot_nodes[name, dim]

    def met(self, name: str) -> list[Tensor]:
        """Return the nodes along each dimension of a tensor that was met."""
        return [nodes for (tensor, _), nodes in self.slot_nodes.items() if tensor == name]

    def fresh(self, count: int, reason: str, zero: bool = False) -> Tensor:
        """Return new nodes that are pinned from the start; ``zero``: they are channels of zeros."""
        nodes = self._number(count)
        self.fresh_nodes.append(nodes)
        if zero:
            self.zeros |= set(nodes.tolist())
        self.pin(nodes, reason)
        return nodes

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Record that nodes at equal (broadcast) positions live or die together."""
        a, b = torch.broadcast_tensors(a, b)
        self.ties.append((a.reshape(-1), b.reshape(-1)))

    def pin(self, nodes: Tensor, reason: str) -> None:
        """Record that nodes must stay; the first reason is kept."""
        for node in torch.unique(nodes).tolist():
            self.reasons.setdefault(node, reason)

    def site(self, key: CallKey, nodes: Tensor, in_parts: bool = True) -> int:
        """Register a site and return the reading to take; ``in_parts``: whether the first reading is possible."""
        self.sites[key] = torch.unique(nodes)
        self.readings[key] = max(self.readings.get(key, 0), 0 if in_parts else 1)
        return self.readings[key]

    def decide(self, what: tuple[CallKey, str], value: T) -> T:
        """Record a decision that follows from where channels vary, and return it."""
        self.decisions[what] = value
        return value

    def ask_for_heads(self, nodes: Tensor, width: int) -> None:
        """Note which sites split these nodes into heads of ``width`` channels; or of twice or three times as many, to be split again."""
        found = [(key, last) for key, (split, last) in self.splits.items() if torch.isin(nodes, split).any()]
        exact = {key for key, last in found if last == width}
        self.asked |= exact or {key for key, last in found if last in (2 * width, 3 * width)}

    def touch(self, nodes: Tensor) -> None:
        """Record that an operation may have changed channels of zeros."""
        if self.zeros:
            self.zeros -= set(torch.unique(nodes).tolist())

    def route(self, buffer: str, read: Tensor, index: Tensor) -> Tensor:
        """Record a gather by a buffer; return the nodes of its outputs."""
        zero = next((position for position, node in enumerate(read.tolist()) if node in self.zeros), None)
        self.routes.append(Route(buffer, read, index.clone(), zero))
        out = self.nodes(buffer, 0)
        if zero is None:
            self.tie(out, read[index])
        else:
            self.producers.add((buffer, 0))
        return out

    def takes_whole_groups(self, weight: str, groups: int, per_group: int) -> bool:
        """Decide whether a grouped convolution loses whole groups (where it has many small ones) or the same places of each."""
        return self.whole_groups.setdefault(weight, groups >= per_group)

    def components(self) -> Tensor:
        """Return, for each node, the smallest node that it is tied to, directly or through others: int64 [count]."""
        label = np.arange(self.count)
        if not self.ties:
            return torch.from_numpy(label)
        a, b = (torch.cat(side).numpy() for side in zip(*self.ties, strict=True))
        while True:
            low = np.minimum(label[a], label[b])
            before = label.copy()
            np.minimum.at(label, label[a], low)
            np.minimum.at(label, label[b], low)
            while (label[label] != label).any():
                label = label[label]
            if (label == before).all():
                return torch.from_numpy(label)

    def _number(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)


@dataclass
class Proof(TraceRecord):
    """The trace of a shrunk network: every channel must be the one that the record of the whole network foresees.

    Attributes:
        expected: the whole network's node for each slot that was kept.
        expected_fresh: alike for the pinned nodes that no tensor owns, call by call.
        expected_routes: what each buffer's gather must find.
        fixed: the components that must stay.
        component: of each node of the whole network.
    """

    expected: dict[TensorDim, Tensor] = field(default_factory=dict)
    expected_fresh: list[Tensor] = field(default_factory=list)
    expected_routes: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    component: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def nodes(self, name: str, dim: int) -> Tensor:
        found, size = self.expected.get((name, dim)), self.by_name[name].shape[dim]
        if found is None:
            raise Mismatch(f"dimension {dim} of {name} was not met before")
        if len(found) != size:
            raise Mismatch(f"{name} has {size} entries along dimension {dim}, not {len(found)}")
        return found

    def met(self, name: str) -> list[Tensor]:
        return [nodes for (tensor, _), nodes in self.expected.items() if tensor == name]

    def fresh(self, count: int, reason: str, zero: bool = False) -> Tensor:
        if not self.expected_fresh or len(self.expected_fresh[0]) != count:
            raise Mismatch(reason)
        return self.expected_fresh.pop(0)

    def route(self, buffer: str, read: Tensor, index: Tensor) -> Tensor:
        self.tie(read[index], self.expected_routes[buffer])
        return self.nodes(buffer, 0)

    def tie(self, a: Tensor, b: Tensor) -> None:
        try:
            equal = bool((self.component[a] == self.component[b]).all())
        except RuntimeError:
            equal = False
        if not equal:
            raise Mismatch("channels meet that did not meet before")

    def site(self, key: CallKey, nodes: Tensor, in_parts: bool = True) -> int:
        return self.readings.get(key, 0)

    def decide(self, what: tuple[CallKey, str], value: T) -> T:
        taken: T = self.decisions.get(what, value)
        return taken

    def pin(self, nodes: Tensor, reason: str) -> None:
        """Whatever is pinned now must have been pinned in the whole network."""
        if not set(self.component[torch.unique(nodes)].tolist()) <= self.fixed:
            raise Mismatch(reason)


def owned_tensors(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Return a network's parameters and buffers by identity, each with its (first) name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(id(tensor), (name, tensor))
    return found
