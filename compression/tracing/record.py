"""What a trace writes down: which slots of which tensors carry the same channel, and which may not go.

A *slot* is one position along one dimension of a parameter or buffer; a *node* is the number of a slot, or of a channel
that no tensor owns (the network's input, a padded zero). Nodes that are tied live or die together; nodes that are
pinned stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Slots = tuple[str, int]  # (name of a parameter or buffer, dimension)
Nodes = NDArray[np.int64]
Key = tuple[str, str, int]  # the module, the operation, and its number among those alike there
T = TypeVar("T")


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
        tap: the number of the computed tensor that shows the made channels as their readers see them: the last one of
            the same size that follows by norms, activations and additions alone before anything else reads it.
        spatial: whether that tensor is a stack of maps [B, C, H, W]; else its last axis has the channels.
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
        zero: the input position that is constantly zero, which takes the place of what was removed; None where a
            removed input takes its outputs with it.
    """

    buffer: str
    read: Tensor
    index: Tensor
    zero: int | None


@dataclass
class TraceRecord:
    """The record of one trace.

    Attributes:
        owned: the network's parameters and buffers; one that has several names is here under the first.
        levels: for each operation whose sizes may follow from the shapes, by its key, which reading of it is taken;
            see ``rules``.
    """

    owned: dict[int, tuple[str, Tensor]]
    levels: dict[Key, int] = field(default_factory=dict)
    bases: dict[Slots, Tensor] = field(default_factory=dict)
    producers: set[Slots] = field(default_factory=set)
    readers: set[Slots] = field(default_factory=set)
    contractions: list[Contraction] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    whole_groups: dict[str, bool] = field(default_factory=dict)
    norm_groups: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    sites: dict[Key, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)
    decisions: dict[tuple[Key, str], Any] = field(default_factory=dict)
    unsized_norms: dict[str, Tensor] = field(default_factory=dict)
    zeros: set[int] = field(default_factory=set)
    count: int = 0
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_name = dict(self.owned.values())

    @classmethod
    def of(cls, model: nn.Module, levels: dict[Key, int]) -> TraceRecord:
        """Start a record of a network."""
        return cls(owned_tensors(model), levels)

    def nodes(self, name: str, dim: int) -> Tensor:
        """Return the nodes of a tensor's dimension."""
        if (name, dim) not in self.bases:
            self.bases[name, dim] = self._number(self._tensor(name).shape[dim])
        return self.bases[name, dim]

    def fresh(self, count: int, reason: str, zero: bool = False) -> Tensor:
        """Return new nodes that are pinned from the start; ``zero`` where they are channels of zeros."""
        nodes = self._number(count)
        self.made.append(nodes)
        self.zeros |= set(nodes.tolist()) if zero else set()
        self.pin(nodes, reason)
        return nodes

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Note that nodes at equal (broadcast) positions live or die together."""
        a, b = torch.broadcast_tensors(a, b)
        self.left.append(a.reshape(-1))
        self.right.append(b.reshape(-1))

    def pin(self, nodes: Tensor, reason: str) -> None:
        """Note that nodes must stay; the first reason is kept."""
        for node in torch.unique(nodes).tolist():
            self.reasons.setdefault(node, reason)

    def site(self, key: Key, nodes: Tensor, in_parts: bool = True) -> int:
        """Register an operation (by its key) whose sizes may follow from the shapes; return the reading to take.

        ``in_parts`` says whether the first reading is possible.
        """
        self.sites[key] = torch.unique(nodes)
        self.levels[key] = max(self.levels.get(key, 0), 0 if in_parts else 1)
        return self.levels[key]

    def decide(self, what: tuple[Key, str], value: T) -> T:
        """Note a decision that follows from where channels vary, and return it."""
        self.decisions[what] = value
        return value

    def touch(self, nodes: Tensor) -> None:
        """Note that an operation may have made something else of channels of zeros, or written to them."""
        if self.zeros:
            self.zeros -= set(torch.unique(nodes).tolist())

    def route(self, buffer: str, read: Tensor, index: Tensor) -> Tensor:
        """Note a gather by a buffer; return the nodes of its outputs."""
        zero = next((place for place, node in enumerate(read.tolist()) if node in self.zeros), None)
        self.routes.append(Route(buffer, read, index.clone(), zero))
        out = self.nodes(buffer, 0)
        if zero is None:
            self.tie(out, read[index])
        else:
            self.producers.add((buffer, 0))
        return out

    def takes_whole_groups(self, weight: str, groups: int, per_group: int) -> bool:
        """Decide whether a grouped convolution loses whole groups (many small ones) or the same places of each."""
        return self.whole_groups.setdefault(weight, groups >= per_group)

    def components(self) -> Nodes:
        """Return, for each node, the smallest node that it is tied to, directly or through others."""
        label = np.arange(self.count)
        if not self.left:
            return label
        a, b = torch.cat(self.left).numpy(), torch.cat(self.right).numpy()
        while True:
            low = np.minimum(label[a], label[b])
            before = label.copy()
            np.minimum.at(label, label[a], low)
            np.minimum.at(label, label[b], low)
            while (label[label] != label).any():
                label = label[label]
            if (label == before).all():
                return label

    def _tensor(self, name: str) -> Tensor:
        return self._by_name[name]

    def _number(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)


@dataclass
class Proof(TraceRecord):
    """The trace of a shrunk network: every channel must be the one that the record of the whole network foresees.

    Nodes are those of that record. ``expected`` gives those of each kept slot, ``expected_fresh`` those of the pinned
    nodes in the order of their making, ``expected_routes`` what each buffer's gather must find, ``component`` what
    lives or dies together and ``fixed`` the components that may not go.
    """

    expected: dict[Slots, Tensor] = field(default_factory=dict)
    expected_fresh: list[Tensor] = field(default_factory=list)
    expected_routes: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    component: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def nodes(self, name: str, dim: int) -> Tensor:
        found = self.expected.get((name, dim))
        if found is None:
            raise Mismatch(f"dimension {dim} of {name} was not met before")
        if len(found) != self._tensor(name).shape[dim]:
            raise Mismatch(f"{name} has {self._tensor(name).shape[dim]} entries along dimension {dim}, not {len(found)}")
        return found

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

    def site(self, key: Key, nodes: Tensor, in_parts: bool = True) -> int:
        return self.levels.get(key, 0)

    def decide(self, what: tuple[Key, str], value: T) -> T:
        taken: T = self.decisions.get(what, value)
        return taken

    def pin(self, nodes: Tensor, reason: str) -> None:
        """What is pinned now must have been pinned before."""
        if not set(self.component[torch.unique(nodes)].tolist()) <= self.fixed:
            raise Mismatch(reason)


def owned_tensors(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Return a network's parameters and buffers by identity, with their (first) names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(id(tensor), (name, tensor))
    return found
