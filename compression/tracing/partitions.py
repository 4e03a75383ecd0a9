"""Movements that cut the channels into parts: chunks, slices, shuffles, gates. See ``rules`` for the readings of a site."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates
from compression.tracing.movements import plain, redo
from compression.tracing.rules import Call, Outcome, Rule, aten, barrier


def _tie_parts(call: Call, ids: Tensor, dim: int, size: int) -> Tensor:
    """Tie the same places of parts of equal size; return the nodes with those of the first part in all."""
    shape = (*ids.shape[:dim], ids.shape[dim] // size, size, *ids.shape[dim + 1 :])
    split = ids.reshape(shape)
    first = split.narrow(dim, 0, 1)
    call.record.tie(first, split)
    return first.expand(shape).reshape(ids.shape)


def _tie_neighbours(call: Call, ids: Tensor, dim: int, size: int) -> Tensor:
    """Tie the places of each part of equal size; return the nodes with the first of each part in all of it."""
    shape = (*ids.shape[:dim], ids.shape[dim] // size, size, *ids.shape[dim + 1 :])
    split = ids.reshape(shape)
    first = split.narrow(dim + 1, 0, 1)
    call.record.tie(first, split)
    return first.expand(shape).reshape(ids.shape)


def parts(call: Call) -> Outcome:
    """split, chunk, unbind: the sizes may follow the shape, in parts as large as their common measure."""
    mark, dim = call.mark("self"), call["dim"]
    if mark is None:
        return barrier(call)
    results = list(call.result)
    if isinstance(mark, Coordinates):
        pieces = [redo(call, place) for place in mark.places]
        return [Coordinates(mark.name, tuple(piece[i] for piece in pieces), False) for i in range(len(results))]
    dim %= len(mark.shape)
    full = mark.full()
    if dim in mark.axes and len(results) > 1:
        measure = math.gcd(*(result.shape[dim] if result.ndim == full.ndim else 1 for result in results))
        if call.record.site(call.key, mark.ids, measure > 1) == 0:
            full = _tie_parts(call, full, dim, measure)
        else:
            call.record.pin(mark.ids, f"{call.where} cuts the channels at fixed places")
    return [ChannelLabel.of(piece) for piece in redo(call, full)]


def slice_(call: Call) -> Outcome:
    """x[:, start:end:step] along channels."""
    mark = call.mark("self")
    if mark is None:
        return barrier(call)
    dim = call["dim"] % call.result.ndim
    if isinstance(mark, Coordinates) or dim not in mark.axes or call.result.shape == mark.shape:
        return mark.moved(lambda ids: redo(call, ids))
    size, ids = mark.shape[dim], mark.full()
    given_start, given_end, step = call["start"] or 0, size if call["end"] is None else call["end"], call["step"]
    start, end = (min(max(place + size if place < 0 else place, 0), size) for place in (given_start, given_end))
    reason = f"{call.where} takes channels by fixed places"
    measure = math.gcd(size, start, end)
    in_parts = measure > 1 if step == 1 else size % step == 0 and start < step and end == size
    level = call.record.site(call.key, mark.ids, in_parts)
    if level == 0:
        ids = _tie_parts(call, ids, dim, measure) if step == 1 else _tie_neighbours(call, ids, dim, step)
    elif level == 1 and step == 1:
        for place in (given_start, given_end):  # what lies before a place, or behind one that counts from the end
            if 0 < place < size:
                call.record.pin(ids.narrow(dim, 0, place), reason)
            elif -size < place < 0:
                call.record.pin(ids.narrow(dim, size + place, -place), reason)
    else:
        call.record.pin(ids, reason)
    return ChannelLabel.of(redo(call, ids))


def select(call: Call) -> Outcome:
    """x[:, k]: one channel by its place."""
    mark = call.mark("self")
    if isinstance(mark, ChannelLabel) and call["dim"] % len(mark.shape) in mark.axes:
        call.record.pin(mark.ids, f"{call.where} takes a channel by its place")
    return plain(call)


def roll(call: Call) -> Outcome:
    """Roll channels: by a share of their number, whose parts are tied, or by a fixed number, and what wraps around stays."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    if not call["dims"]:
        if label.axes:
            call.record.pin(label.ids, f"{call.where} rolls all axes as one")
        return plain(call)
    ids = label.full()
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        dim %= len(label.shape)
        size = label.shape[dim]
        if dim not in label.axes or shift % size == 0:
            continue
        level = call.record.site(call.key, label.ids, size % abs(shift) == 0 and abs(shift) > 1)
        if level == 0:
            ids = _tie_parts(call, ids, dim, abs(shift))
        elif level == 1:
            count = abs(shift) % size
            wrapped = ids.narrow(dim, size - count if shift > 0 else 0, count)
            call.record.pin(wrapped, f"{call.where} wraps a fixed number of channels around")
        else:
            call.record.pin(ids, f"{call.where} wraps a fixed number of channels around")
    return ChannelLabel.of(redo(call, ids))


def pixel_shuffle(call: Call) -> Outcome:
    """Channels become pixels: those of one output channel are tied."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    axis = len(label.shape) - 3
    ids = label.full()
    if axis in label.axes:
        ids = _tie_neighbours(call, ids, axis, call["upscale_factor"] ** 2)
    return ChannelLabel.of(redo(call, ids))


def channel_shuffle(call: Call) -> Outcome:
    """The same place of every group is tied."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    by_group = label.vector(1, call.record).view(call["groups"], -1)
    call.record.tie(by_group[:1], by_group)
    return plain(call)


def glu(call: Call) -> Outcome:
    """Gated linear unit: the halves are tied place by place."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    dim = call["dim"] % len(label.shape)
    half = label.shape[dim] // 2
    ids = label.full()
    call.record.tie(ids.narrow(dim, 0, half), ids.narrow(dim, half, half))
    return ChannelLabel.of(ids.narrow(dim, 0, half))


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
