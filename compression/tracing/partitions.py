"""Movements that cut the channels into parts: chunks, slices, shuffles, gates; ``rules`` explains the readings."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, tie_along
from compression.tracing.movements import plain, redo
from compression.tracing.rules import Call, Outcome, Rule, aten


def _tie_parts(call: Call, ids: Tensor, dim: int, size: int) -> Tensor:
    """Tie the same positions of parts of equal size; return the nodes with those of the first part in all."""
    return _tie_split(call, ids, dim, size, dim)


def _tie_neighbours(call: Call, ids: Tensor, dim: int, size: int) -> Tensor:
    """Tie the positions within each part of equal size; return the nodes with the first of each part in all of it."""
    return _tie_split(call, ids, dim, size, dim + 1)


def _tie_split(call: Call, ids: Tensor, dim: int, size: int, axis: int) -> Tensor:
    split = ids.unflatten(dim, (-1, size))
    return tie_along(split, [axis], call.record).expand(split.shape).reshape(ids.shape)


def parts(call: Call) -> Outcome:
    """split, chunk, unbind: the sizes may follow the shape, in parts as large as their greatest common divisor."""
    mark, dim, results = call.known("self"), call["dim"], list(call.result)
    if isinstance(mark, Coordinates):
        pieces = [redo(call, positions) for positions in mark.positions]
        return [Coordinates(mark.name, tuple(piece[i] for piece in pieces), False) for i in range(len(results))]
    dim %= len(mark.shape)
    full = mark.full()
    if dim in mark.axes and len(results) > 1:
        size = math.gcd(*(result.shape[dim] if result.ndim == full.ndim else 1 for result in results))
        if call.reading(mark.ids, size > 1) == 0:
            full = _tie_parts(call, full, dim, size)
        else:
            call.pin(mark.ids, "cuts the channels at fixed places")
    return [ChannelLabel.of(piece) for piece in redo(call, full)]


def slice_(call: Call) -> Outcome:
    """x[:, start:end:step] along channels."""
    mark, what = call.known("self"), "takes channels by fixed places"
    dim = call["dim"] % call.result.ndim
    if isinstance(mark, Coordinates) or dim not in mark.axes or call.result.shape == mark.shape:
        return mark.moved(lambda ids: redo(call, ids))
    size, ids = mark.shape[dim], mark.full()
    bounds, step = (call["start"] or 0, size if call["end"] is None else call["end"]), call["step"]
    start, end = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in bounds)
    part = math.gcd(size, start, end)
    reading = call.reading(mark.ids, part > 1 if step == 1 else size % step == 0 and start < step and end == size)
    if reading == 0:
        ids = _tie_parts(call, ids, dim, part) if step == 1 else _tie_neighbours(call, ids, dim, step)
    elif reading == 1 and step == 1:
        for bound in bounds:  # what lies before it, or behind one that counts from the end
            if 0 < bound < size:
                call.pin(ids.narrow(dim, 0, bound), what)
            elif -size < bound < 0:
                call.pin(ids.narrow(dim, size + bound, -bound), what)
    else:
        call.pin(ids, what)
    return ChannelLabel.of(redo(call, ids))


def select(call: Call) -> Outcome:
    """x[:, k]: one channel by its place."""
    mark = call.mark("self")
    if isinstance(mark, ChannelLabel) and call["dim"] % len(mark.shape) in mark.axes:
        call.pin(mark.ids, "takes a channel by its place")
    return plain(call)


def roll(call: Call) -> Outcome:
    """Roll channels: by a share of their number, whose parts are tied, or by a fixed number, and what wraps around stays."""
    label, wraps = call.label("self"), "wraps a fixed number of channels around"
    if not call["dims"]:
        if label.axes:
            call.pin(label.ids, "rolls all axes as one")
        return plain(call)
    ids = label.full()
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        dim %= len(label.shape)
        size = label.shape[dim]
        if dim not in label.axes or shift % size == 0:
            continue
        reading = call.reading(label.ids, size % abs(shift) == 0 and abs(shift) > 1)
        if reading == 0:
            ids = _tie_parts(call, ids, dim, abs(shift))
        elif reading == 1:
            count = abs(shift) % size
            call.pin(ids.narrow(dim, size - count if shift > 0 else 0, count), wraps)
        else:
            call.pin(ids, wraps)
    return ChannelLabel.of(redo(call, ids))


def pixel_shuffle(call: Call) -> Outcome:
    """Channels become pixels: those of one output channel are tied."""
    label = call.label("self")
    axis, ids = len(label.shape) - 3, label.full()
    if axis in label.axes:
        ids = _tie_neighbours(call, ids, axis, call["upscale_factor"] ** 2)
    return ChannelLabel.of(redo(call, ids))


def channel_shuffle(call: Call) -> Outcome:
    """The same position of every group is tied."""
    by_group = call.label("self").vector(1, call.record).view(call["groups"], -1)
    call.tie(by_group[:1], by_group)
    return plain(call)


def glu(call: Call) -> Outcome:
    """Gated linear unit: the halves are tied position by position."""
    label = call.label("self")
    first, second = label.full().chunk(2, call["dim"])
    call.tie(first, second)
    return ChannelLabel.of(first)


PARTITIONS: dict[Any, Rule] = {
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unbind), parts),
    **dict.fromkeys((aten.channel_shuffle, aten.native_channel_shuffle), channel_shuffle),
    aten.pixel_shuffle: pixel_shuffle,
    aten.pixel_unshuffle: plain,
    aten.slice: slice_,
    aten.select: select,
    aten.roll: roll,
    aten.glu: glu,
}
