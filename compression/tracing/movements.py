"""Data movement: the operation itself moves the nodes as it moves the data, so no rule can get the order wrong.

What needs care is a size in the code that decides which channels go where; ``rules`` explains the readings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compression.tracing.attention import split_into_heads
from compression.tracing.channel_labels import ChannelLabel, Coordinates, strip, tie_along
from compression.tracing.rules import Call, Mark, NotFollowed, Outcome, Rule, aten


def redo(call: Call, ids: Tensor) -> Any:
    """Do the call's operation with other data in place of its first argument."""
    schema = call.op._schema.arguments
    arguments = {**call.arguments, schema[0].name: ids}
    return call.op(*(arguments[argument.name] for argument in schema if not argument.kwarg_only))


def plain(call: Call) -> Outcome:
    """Movements that commute with removing channels: flipped, repeated, expanded."""
    return call.known(next(iter(call.arguments))).moved(lambda ids: redo(call, ids))


def reorder(call: Call) -> Outcome:
    """Movements that only put axes into another order."""
    mark = call.mark("self")
    if not isinstance(mark, Coordinates) or mark.order is None:
        return plain(call)
    sizes = redo(call, torch.zeros(*range(2, 2 + len(mark.order)))).shape  # each axis has a size of its own, which tells it
    moved = mark.moved(lambda ids: redo(call, ids))
    return replace(moved, order=tuple(mark.order[size - 2] for size in sizes))


def unchanged(call: Call) -> Outcome:
    """Copies and casts."""
    mark = call.mark(next(iter(call.arguments)))
    return replace(mark, direct=False) if isinstance(mark, Coordinates) else mark


def view(call: Call) -> Outcome:
    """Merging axes moves channels as they are; splitting channels over two axes is a site."""
    mark, shape = call.known("self"), call.result.shape
    if isinstance(mark, Coordinates):
        return mark.moved(lambda ids: ids.reshape(shape))
    moved = mark.moved(lambda ids: ids.reshape(shape))
    if call.key in call.record.heads:
        return split_into_heads(call, moved)
    if len(moved.axes) <= len(mark.axes):
        return moved
    call.record.splits[call.key] = torch.unique(moved.ids), shape[max(moved.axes)]
    reading = call.reading(moved.ids)
    if reading > 1:
        call.pin(moved.ids, "splits the channels into sizes that do not follow them")
        return moved
    axes = sorted(moved.axes)
    return ChannelLabel(strip(tie_along(moved.ids, axes[:-1] if reading == 0 else axes[1:], call.record)), shape)


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
    known = [mark for mark in marks if isinstance(mark, ChannelLabel)]
    if not known:
        raise NotFollowed
    wanted = call.decide("axes", frozenset().union(*(label.axes for label in known)) or frozenset({dim}))
    labels = [
        mark if isinstance(mark, ChannelLabel) else _as_label(call, tensor, mark, wanted)
        for tensor, mark in zip(tensors, marks, strict=True)
    ]
    axes = frozenset().union(*(label.axes for label in labels))
    if call.decide("lined up", bool(axes) and dim not in axes):  # along another axis (stacked, say): channels meet one by one
        ids = max((label.ids for label in labels), key=lambda ids: ids.numel())
        for label in labels:
            call.tie(label.ids, ids)
        return ChannelLabel(ids, call.result.shape)
    pieces = []
    for label in labels:
        shape = [size if axis in axes or axis == dim else 1 for axis, size in enumerate(label.shape)]
        pieces.append(label.ids.expand(shape))
    return ChannelLabel(strip(torch.cat(pieces, dim)), call.result.shape)


def _as_label(call: Call, tensor: Tensor, mark: Mark | None, axes: frozenset[int]) -> ChannelLabel:
    """Give a parameter or a constant that joins activations nodes of its own along the axes of their channels."""
    if isinstance(mark, Coordinates):
        stripped = [strip(positions) for positions in mark.positions]
        moving = [dim for dim, positions in enumerate(stripped) if any(positions.shape[axis] > 1 for axis in axes)]
        moving = call.decide("moving", moving)
        if len(moving) != 1:
            raise NotFollowed
        return ChannelLabel(call.record.nodes(mark.name, moving[0])[stripped[moving[0]]], tensor.shape)
    if len(axes) > 1:
        raise NotFollowed
    shape = [size if axis in axes else 1 for axis, size in enumerate(tensor.shape)]
    nodes = call.record.fresh(math.prod(shape), f"a constant joins the channels at {call.where}")
    return ChannelLabel(nodes.view(shape), tensor.shape)


def pad(call: Call) -> Outcome:
    """Padding space keeps the channels; padding channels adds constant ones, whose number the code fixes."""
    label, amounts = call.label("self"), call["pad"]
    ids = label.full()
    for i in range(0, len(amounts), 2):
        axis = ids.ndim - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        if not call.decide(f"along {axis}", axis in label.axes):
            shape = list(ids.shape)
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        if before < 0 or after < 0:
            raise NotFollowed
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
    """x[:, index] or index_select: surgery can mend the route of an owned integer buffer; other positions are fixed."""
    mark = call.known("self")
    index = call.arguments.get("indices") or [*[None] * (call["dim"] % call.result.ndim), call["index"]]
    chosen = [axis for axis, entry in enumerate(index) if entry is not None]
    if any(isinstance(call.marks.get(id(index[axis])), ChannelLabel) for axis in chosen):
        raise NotFollowed
    on_cpu = [None if entry is None else entry.cpu() for entry in index]
    moved = mark.moved(lambda ids: aten.index(ids, on_cpu))
    masks = any(index[axis].dtype in (torch.bool, torch.uint8) for axis in chosen)
    if isinstance(mark, Coordinates) or (not masks and not mark.axes & set(chosen)):
        return moved
    axis = chosen[0]
    source = call.marks.get(id(index[axis]))
    if masks or len(chosen) > 1 or not isinstance(source, Coordinates) or not source.direct or index[axis].ndim != 1:
        call.pin(mark.ids, "takes channels by fixed places")
        return moved
    out = call.record.route(source.name, mark.vector(axis, call.record), index[axis].cpu())
    shape = [1] * call.result.ndim
    shape[axis] = len(out)
    return ChannelLabel(out.view(shape), call.result.shape)


def unfold(call: Call) -> Outcome:
    """Windows become channels: those of one input channel stand together and go together."""
    channels = call.label("self").vector(call["self"].ndim - 3, call.record)
    ids = channels.repeat_interleave(math.prod(call["kernel_size"]))
    return ChannelLabel(ids.view(*[1] * (call.result.ndim - 2), -1, 1), call.result.shape)


MOVEMENTS: dict[Any, Rule] = {
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), reorder),
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.expand, aten.flip, aten.repeat), plain),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh), unchanged),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), view),
    **dict.fromkeys((aten.index, aten.index_select), gather),
    aten.im2col: unfold,
    aten.cat: cat,
    aten.stack: stack,
    aten.constant_pad_nd: pad,
}
