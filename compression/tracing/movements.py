"""Data movement: the same operation is done with the nodes as with the data, and nothing can be got wrong by hand.

What needs care is where a size in the code decides which channels go where; ``rules`` explains the readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, strip
from compression.tracing.rules import Call, Mark, Outcome, Rule, aten, barrier


def redo(call: Call, ids: Tensor) -> Any:
    """Do the call's operation with other data."""
    arguments = dict(call.arguments)
    name = next(iter(arguments))
    arguments[name] = ids
    positional = [arguments[a.name] for a in call.op._schema.arguments if not a.kwarg_only]
    return call.op(*positional)


def plain(call: Call) -> Outcome:
    """Movements that commute with removing channels: transposed, flipped, repeated, copied."""
    mark = call.mark(next(iter(call.arguments)))
    return barrier(call) if mark is None else mark.moved(lambda ids: redo(call, ids))


def reorder(call: Call) -> Outcome:
    """Movements that only put axes into another order."""
    mark = call.mark("self")
    if not isinstance(mark, Coordinates) or mark.order is None:
        return plain(call)
    axes = redo(call, torch.zeros(*range(2, 2 + len(mark.order)))).shape  # sizes of its own for each axis
    moved = mark.moved(lambda ids: redo(call, ids))
    return replace(moved, order=tuple(mark.order[size - 2] for size in axes))


def unchanged(call: Call) -> Outcome:
    """Copies and casts."""
    mark = call.mark(next(iter(call.arguments)))
    if isinstance(mark, Coordinates):
        return replace(mark, direct=False)
    return mark


def view(call: Call) -> Outcome:
    """Merging axes moves channels as they are; splitting channels over two axes is a site."""
    mark, shape = call.mark("self"), call.result.shape
    if mark is None:
        return barrier(call)
    if isinstance(mark, Coordinates):
        return mark.moved(lambda ids: ids.reshape(shape))
    moved = mark.moved(lambda ids: ids.reshape(shape))
    axes = sorted(moved.axes)
    if len(axes) <= len(mark.axes):
        return moved
    level = call.record.site(call.key, moved.ids)
    if level > 1:
        call.record.pin(moved.ids, f"{call.where} splits the channels into sizes that do not follow them")
        return moved
    tied = axes[:-1] if level == 0 else axes[1:]
    return _tied(call, moved.ids, tied, shape)


def _tied(call: Call, ids: Tensor, axes: list[int], shape: torch.Size) -> ChannelLabel:
    first = ids
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    call.record.tie(first, ids)
    return ChannelLabel(strip(first), shape)


def cat(call: Call) -> Outcome:
    """Concatenate; a part without channels of its own (a constant) is pinned."""
    tensors = [tensor for tensor in call["tensors"] if tensor.numel()]
    return _joined(call, tensors, [call.marks.get(id(tensor)) for tensor in tensors], call["dim"] % call.result.ndim)


def stack(call: Call) -> Outcome:
    """Concatenate along a new axis."""
    dim = call["dim"] % call.result.ndim
    marks = [call.marks.get(id(tensor)) for tensor in call["tensors"]]
    moved = [mark if mark is None else mark.moved(lambda ids: ids.unsqueeze(dim)) for mark in marks]
    return _joined(call, [tensor.unsqueeze(dim) for tensor in call["tensors"]], moved, dim)


def _joined(call: Call, tensors: list[Tensor], marks: Sequence[Mark | None], dim: int) -> Outcome:
    record = call.record
    if not any(isinstance(mark, ChannelLabel) for mark in marks):
        return barrier(call)
    labels: list[ChannelLabel] = []
    wanted = frozenset().union(*(mark.axes for mark in marks if isinstance(mark, ChannelLabel))) or frozenset({dim})
    wanted = call.decide("axes", wanted)
    for tensor, mark in zip(tensors, marks, strict=True):
        label = mark if isinstance(mark, ChannelLabel) else _as_label(call, tensor, mark, wanted)
        if label is None:
            return barrier(call)
        labels.append(label)
    axes = frozenset().union(*(label.axes for label in labels))
    if call.decide(
        "lined up", bool(axes) and dim not in axes
    ):  # lined up along another axis (stacked, say): the channels meet place by place
        ids = max((label.ids for label in labels), key=lambda ids: ids.numel())
        for label in labels:
            record.tie(label.ids, ids)
        return ChannelLabel(ids, call.result.shape)
    pieces = []
    for label in labels:
        shape = [size if axis in axes or axis == dim else 1 for axis, size in enumerate(label.shape)]
        pieces.append(label.ids.expand(shape))
    return ChannelLabel(strip(torch.cat(pieces, dim)), call.result.shape)


def _as_label(call: Call, tensor: Tensor, mark: Mark | None, axes: frozenset[int]) -> ChannelLabel | None:
    """Give a parameter or a constant that joins activations nodes of its own along the axes of their channels."""
    if isinstance(mark, Coordinates):
        places = [(dim, strip(place)) for dim, place in enumerate(mark.places)]
        moving = [places[i] for i in _moving(call, places, axes)]
        return ChannelLabel(call.record.nodes(mark.name, moving[0][0])[moving[0][1]], tensor.shape) if len(moving) == 1 else None
    if len(axes) > 1:
        return None
    shape = [size if axis in axes else 1 for axis, size in enumerate(tensor.shape)]
    nodes = call.record.fresh(math.prod(shape), f"a constant joins the channels at {call.where}")
    return ChannelLabel(nodes.view(shape), tensor.shape)


def _moving(call: Call, places: list[tuple[int, Tensor]], axes: frozenset[int]) -> list[int]:
    found = [i for i, (_, place) in enumerate(places) if any(place.shape[axis] > 1 for axis in axes)]
    return call.decide("moving", found)


def pad(call: Call) -> Outcome:
    """Padding space keeps the channels; padding channels adds constant ones, whose number the code fixes."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    ids, amounts = label.full(), call["pad"]
    for i in range(0, len(amounts), 2):
        axis = ids.ndim - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        if not call.decide(f"along {axis}", axis in label.axes):
            shape = list(ids.shape)
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        if before < 0 or after < 0:
            return barrier(call)
        pieces = [_constant(call, ids, axis, before), ids, _constant(call, ids, axis, after)]
        ids = torch.cat([piece for piece in pieces if piece is not None], axis)
    return ChannelLabel.of(ids)


def _constant(call: Call, ids: Tensor, axis: int, count: int) -> Tensor | None:
    if not count:
        return None
    shape = [1] * ids.ndim
    shape[axis] = count
    reason = f"{call.where} pads the channels with a fixed number of constants"
    nodes = call.record.fresh(count, reason, zero=call["value"] == 0)
    expanded = list(ids.shape)
    expanded[axis] = count
    return nodes.view(shape).expand(expanded)


def gather(call: Call) -> Outcome:
    """x[:, index] or index_select: by an owned integer buffer a route that surgery can mend, else by fixed places."""
    mark = call.mark("self")
    index = call.arguments.get("indices") or [*[None] * (call["dim"] % call.result.ndim), call["index"]]
    chosen = [i for i, entry in enumerate(index) if entry is not None]
    if mark is None or any(isinstance(call.marks.get(id(index[i])), ChannelLabel) for i in chosen):
        return barrier(call)
    places = [None if entry is None else entry.cpu() for entry in index]

    def move(ids: Tensor) -> Tensor:
        return aten.index(ids, places)

    if isinstance(mark, Coordinates):
        return mark.moved(move)
    masks = any(index[i].dtype in (torch.bool, torch.uint8) for i in chosen)
    if not masks and not any(i in mark.axes for i in chosen):
        return mark.moved(move)
    axis = chosen[0]
    source = call.marks.get(id(index[axis]))
    if masks or len(chosen) > 1 or not isinstance(source, Coordinates) or not source.direct or index[axis].ndim != 1:
        call.record.pin(mark.ids, f"{call.where} takes channels by fixed places")
        return mark.moved(move)
    out = call.record.route(source.name, mark.vector(axis, call.record), index[axis].cpu())
    shape = [1] * call.result.ndim
    shape[axis] = len(out)
    return ChannelLabel(out.view(shape), call.result.shape)


MOVEMENTS: dict[Any, Rule] = {
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), reorder),
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.expand, aten.flip, aten.repeat), plain),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh), unchanged),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), view),
    **dict.fromkeys((aten.index, aten.index_select), gather),
    aten.cat: cat,
    aten.stack: stack,
    aten.constant_pad_nd: pad,
}
