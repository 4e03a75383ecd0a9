"""What a trace knows of a tensor: the channel at each position of an activation, the origin of each element of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.tracing.record import TraceRecord


@dataclass(frozen=True)
class ChannelLabel:
    """The channel, as a node, at each position of an activation.

    Attributes:
        ids: nodes, int64, of size 1 along every axis along which they do not vary.
        shape: the activation's shape, to which ``ids`` expands.
    """

    ids: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, ids: Tensor) -> ChannelLabel:
        """Make a label from nodes in the activation's full shape."""
        return cls(strip(ids), ids.shape)

    @property
    def axes(self) -> frozenset[int]:
        """The axes along which the nodes vary."""
        return varying_axes(self.ids)

    def full(self) -> Tensor:
        """Return a view of the nodes in the activation's shape."""
        return self.ids.expand(self.shape)

    def moved(self, movement: Callable[[Tensor], Tensor]) -> ChannelLabel:
        """Return the label after a data movement, which is done with the nodes themselves."""
        return ChannelLabel.of(movement(self.full()))

    def vector(self, axis: int, record: TraceRecord) -> Tensor:
        """Return the nodes along one axis; those that differ along the other axes are tied together."""
        others = [other for other in range(self.ids.ndim) if other != axis]
        return tie_along(self.ids, others, record).reshape(-1).expand(self.shape[axis])


@dataclass(frozen=True)
class Coordinates:
    """Where the elements of a tensor stand in the parameter or buffer that they were moved from.

    Attributes:
        name: the parameter or buffer.
        positions: for each of its dimensions, the elements' positions along it.
        direct: whether the tensor is the parameter or buffer itself.
        order: the dimension that each axis was, where only the order of the axes has changed; otherwise None. Nothing
            else tells where an axis of size 1 comes from.
    """

    name: str
    positions: tuple[Tensor, ...]
    direct: bool
    order: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Coordinates:
        """Return the coordinates of a parameter or buffer in itself."""
        shape = tensor.shape
        positions = (torch.arange(size).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape) for dim, size in enumerate(shape))
        return cls(name, tuple(positions), True, tuple(range(len(shape))))

    def moved(self, movement: Callable[[Tensor], Tensor]) -> Coordinates:
        """Return the coordinates after a data movement."""
        return Coordinates(self.name, tuple(movement(positions) for positions in self.positions), False)

    def along(self, axis: int) -> tuple[int, Tensor] | None:
        """Return the one dimension that varies along an axis, and the positions; None where several do, or other axes matter too."""
        if self.order is not None:
            return self.order[axis], torch.arange(self.positions[0].shape[axis])
        if len(self.positions) == 1 and self.positions[0].ndim == 1:
            return 0, self.positions[0]
        stripped = [strip(positions) for positions in self.positions]
        varying = [dim for dim, positions in enumerate(stripped) if positions.shape[axis] > 1]
        if len(varying) != 1 or stripped[varying[0]].numel() != stripped[varying[0]].shape[axis]:
            return None
        return varying[0], stripped[varying[0]].reshape(-1)


def strip(values: Tensor) -> Tensor:
    """Return a view of size 1 along every axis along which the values do not vary."""
    for axis in range(values.ndim):
        if values.shape[axis] > 1:
            first = values.narrow(axis, 0, 1)
            if values.stride(axis) == 0 or bool((values == first).all()):
                values = first
    return values


def varying_axes(stripped: Tensor) -> frozenset[int]:
    """Return the axes along which stripped values vary."""
    return frozenset(axis for axis, size in enumerate(stripped.shape) if size > 1)


def tie_along(ids: Tensor, axes: Iterable[int], record: TraceRecord) -> Tensor:
    """Tie nodes along axes; return one of them for all, with size 1 along these axes."""
    first = ids
    for axis in axes:
        if first.shape[axis] > 1:
            first = first.narrow(axis, 0, 1)
    if first.shape != ids.shape:
        record.tie(first, ids)
    return first


def align(ids: Tensor, ndim: int) -> Tensor:
    """Return a view with leading axes of size 1, as broadcasting would see it."""
    return ids.reshape((1,) * (ndim - ids.ndim) + tuple(ids.shape))
