"""Channel labels: which channel stands at each position of a tensor that passes through the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.tracing.record import TraceRecord


@dataclass(frozen=True)
class ChannelLabel:
    """The nodes at an activation's positions.

    Attributes:
        ids: nodes, int64, of size 1 along every axis along which they do not vary.
        shape: the activation's shape, to which ``ids`` expands.
    """

    ids: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, ids: Tensor) -> ChannelLabel:
        """Make a label of nodes of the activation's full shape."""
        return cls(strip(ids), ids.shape)

    @property
    def axes(self) -> frozenset[int]:
        """The axes along which the nodes vary."""
        return frozenset(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    def full(self) -> Tensor:
        """Return the nodes in the activation's shape, not copied."""
        return self.ids.expand(self.shape)

    def moved(self, movement: Callable[[Tensor], Tensor]) -> ChannelLabel:
        """Return the label after a data movement, done with the nodes themselves."""
        return ChannelLabel.of(movement(self.full()))

    def vector(self, axis: int, record: TraceRecord) -> Tensor:
        """Return the nodes along one axis; those that differ along the other axes are tied together."""
        ids = together(self.ids, [a for a in range(self.ids.ndim) if a != axis], record).reshape(-1)
        return ids.expand(self.shape[axis])


@dataclass(frozen=True)
class Coordinates:
    """Where each element of a tensor stands in the parameter or buffer that it comes from by data movement.

    Attributes:
        name: the parameter or buffer.
        places: for each of its dimensions, the elements' positions along it.
        direct: whether the tensor is the buffer itself.
        order: the dimension that each axis is, where nothing but the order of the axes has changed; else None. A size
            of 1 has no other sign of where it comes from.
    """

    name: str
    places: tuple[Tensor, ...]
    direct: bool
    order: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Coordinates:
        """Return the coordinates of a parameter or buffer in itself."""
        places = []
        for dim, size in enumerate(tensor.shape):
            shape = [1] * tensor.ndim
            shape[dim] = size
            places.append(torch.arange(size).view(shape).expand(tensor.shape))
        return cls(name, tuple(places), True, tuple(range(tensor.ndim)))

    def moved(self, movement: Callable[[Tensor], Tensor]) -> Coordinates:
        """Return the coordinates after a data movement."""
        return Coordinates(self.name, tuple(movement(place) for place in self.places), False)

    def along(self, axis: int) -> tuple[int, Tensor] | None:
        """Return the dimension that alone varies along an axis, and the positions; None where it is not so simple."""
        if self.order is not None:
            return self.order[axis], torch.arange(self.places[0].shape[axis])
        if len(self.places) == 1 and self.places[0].ndim == 1:
            return 0, self.places[0]
        stripped = [strip(place) for place in self.places]
        varying = [dim for dim, place in enumerate(stripped) if place.shape[axis] > 1]
        if len(varying) != 1 or stripped[varying[0]].numel() != stripped[varying[0]].shape[axis]:
            return None
        return varying[0], stripped[varying[0]].reshape(-1)


def strip(ids: Tensor) -> Tensor:
    """Return a view with size 1 along every axis along which the values do not vary."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def together(ids: Tensor, axes: list[int], record: TraceRecord) -> Tensor:
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
