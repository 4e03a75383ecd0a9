"""Data movement: the same operation is done with the nodes as with the data, and nothing can be got wrong by hand.

What needs care is where a size in the code decides which channels go where; ``rules`` explains the readings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compression.labels import Coordinates, Label, strip
from compression.rules import Call, Mark, Outcome, Rule, aten, barrier


def _with(call: Call, ids: Tensor, **changes: Any) -> Any:
    """Do the call's operation with other data."""
    arguments = {**call.arguments, **changes}
    name = next(iter(arguments))
    arguments[name] = ids
    positional = [arguments[a.name] for a in call.op._schema.arguments if not a.kwarg_only]
    return call.op(*positional)


def plain(call: Call) -> Outcome:
    """Movements that commute with removing channels: transposed, flipped, repeated, copied."""
    mark = call.mark(next(iter(call.arguments)))
    return barrier(call) if mark is None else mark.moved(lambda ids: _with(call, ids))


def unchanged(call: Call) -> Outcome:
    """Copies and casts."""
    mark = call.mark(next(iter(call.arguments)))
    if isinstance(mark, Coordinates):
        return Coordinates(mark.name, mark.places, False)
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
    level = call.ledger.site(call.number, moved.ids)
    if level > 1:
        call.ledger.pin(moved.ids, f"{call.where} splits the channels into sizes that do not follow them")
        return moved
    tied = axes[:-1] if level == 0 else axes[1:]
    return _tied(call, moved.ids, tied, shape)


def _tied(call: Call, ids: Tensor, axes: list[int], shape: torch.Size) -> Label:
    first = ids
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    call.ledger.tie(first, ids)
    return Label(strip(first), shape)


def parts(call: Call) -> Outcome:
    """split, chunk, unbind: parts of equal size may follow the shape."""
    mark, dim = call.mark("self"), call["dim"]
    if mark is None:
        return barrier(call)
    results = list(call.result)
    if isinstance(mark, Coordinates):
        pieces = [_with(call, place) for place in mark.places]
        return [Coordinates(mark.name, tuple(piece[i] for piece in pieces), False) for i in range(len(results))]
    dim %= len(mark.shape)
    full = mark.full()
    if dim in mark.axes:
        sizes = {result.shape[dim] if result.ndim == full.ndim else 1 for result in results}
        level = call.ledger.site(call.number, mark.ids) if len(sizes) == 1 else 2
        if level == 0:
            size = sizes.pop()
            first = full.narrow(dim, 0, size)
            for i in range(1, len(results)):
                call.ledger.tie(full.narrow(dim, i * size, size), first)
            full = torch.cat([first] * len(results), dim)
        else:
            call.ledger.pin(mark.ids, f"{call.where} cuts the channels at fixed places")
    return [Label.of(piece) for piece in _with(call, full)]


def slice_(call: Call) -> Outcome:
    """x[:, start:end:step] along channels."""
    mark = call.mark("self")
    if mark is None:
        return barrier(call)
    dim = call["dim"] % call.result.ndim
    if isinstance(mark, Coordinates) or dim not in mark.axes or call.result.shape == mark.shape:
        return mark.moved(lambda ids: _with(call, ids))
    size, ids = mark.shape[dim], mark.full()
    start, end, step = (call[name] for name in ("start", "end", "step"))
    start = min(max(start + size if (start or 0) < 0 else start or 0, 0), size)
    end = min(size if end is None else end + size if end < 0 else end, size)
    part = step if step > 1 else end - start
    fits = size % part == 0 and (start < step and end == size if step > 1 else start % part == 0)
    level = call.ledger.site(call.number, mark.ids) if fits else 1
    if level == 0:
        shape = (*mark.shape[:dim], size // part, part, *mark.shape[dim + 1 :])
        split, tied = ids.reshape(shape), dim + 1 if step > 1 else dim
        first = split.narrow(tied, 0, 1)
        call.ledger.tie(first, split)
        ids = first.expand(shape).reshape(mark.shape)
    elif level == 1 and step == 1:
        fixed = ids.narrow(dim, 0, end) if end < size else ids.narrow(dim, 0, start)
        call.ledger.pin(fixed, f"{call.where} takes channels by fixed places")
    else:
        call.ledger.pin(ids, f"{call.where} takes channels by fixed places")
    return Label.of(_with(call, ids))


def select(call: Call) -> Outcome:
    """x[:, k]: one channel by its place."""
    mark = call.mark("self")
    if isinstance(mark, Label) and call["dim"] % len(mark.shape) in mark.axes:
        call.ledger.pin(mark.ids, f"{call.where} takes a channel by its place")
    return plain(call)


def cat(call: Call) -> Outcome:
    """Concatenate; a part without channels of its own (a constant) is pinned."""
    tensors, dim, ledger = call["tensors"], call["dim"], call.ledger
    marks = [call.marks.get(id(tensor)) for tensor in tensors]
    ndim = call.result.ndim
    dim %= ndim
    if not any(isinstance(mark, Label) for mark in marks):
        return barrier(call)
    labels: list[Label] = []
    for tensor, mark in zip(tensors, marks, strict=True):
        label = mark if isinstance(mark, Label) else _as_label(call, tensor, mark)
        if label is None:
            return barrier(call)
        labels.append(label)
    axes = frozenset().union(*(label.axes for label in labels))
    pieces = []
    for label in labels:
        shape = [size if axis in axes or axis == dim else 1 for axis, size in enumerate(label.shape)]
        pieces.append(label.ids.expand(shape))
    ids = strip(torch.cat(pieces, dim))
    if dim not in axes and dim in _axes(ids):  # parts that look alike within and differ among each other
        for label in labels:
            ledger.pin(label.ids, f"{call.where} lines up channels that are not told apart")
    return Label(ids, call.result.shape)


def _axes(ids: Tensor) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(ids.shape) if size > 1)


def _as_label(call: Call, tensor: Tensor, mark: Mark | None) -> Label | None:
    """Give a parameter or a constant that joins activations nodes of its own."""
    if mark is None:
        shape = [1] * tensor.ndim
        shape[call["dim"]] = tensor.shape[call["dim"]]
        node = call.ledger.fresh(tensor.shape[call["dim"]], f"a constant joins the channels at {call.where}")
        return Label(node.view(shape), tensor.shape)
    assert isinstance(mark, Coordinates)
    places = [(dim, strip(place)) for dim, place in enumerate(mark.places)]
    moving = [(dim, place) for dim, place in places if place.numel() > 1]
    if len(moving) != 1:
        return None
    dim, place = moving[0]
    return Label(call.ledger.nodes(mark.name, dim)[place], tensor.shape)


def pad(call: Call) -> Outcome:
    """Padding space keeps the channels; padding channels adds constant ones, whose number the code fixes."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    ids, amounts = label.full(), call["pad"]
    for i in range(0, len(amounts), 2):
        axis = ids.ndim - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        if axis not in label.axes:
            shape = list(ids.shape)
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        if before < 0 or after < 0:
            return barrier(call)
        pieces = [_constant(call, ids, axis, before), ids, _constant(call, ids, axis, after)]
        ids = torch.cat([piece for piece in pieces if piece is not None], axis)
    return Label.of(ids)


def _constant(call: Call, ids: Tensor, axis: int, count: int) -> Tensor | None:
    if not count:
        return None
    shape = [1] * ids.ndim
    shape[axis] = count
    reason = f"{call.where} pads the channels with a fixed number of constants"
    nodes = call.ledger.fresh(count, reason, zero=call["value"] == 0)
    expanded = list(ids.shape)
    expanded[axis] = count
    return nodes.view(shape).expand(expanded)


def roll(call: Call) -> Outcome:
    """Rolling channels by a fixed number: those that wrap around stay."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    for shift, dim in zip(call["shifts"], call["dims"] or [0], strict=True):
        dim %= len(label.shape)
        if dim in label.axes:
            size = label.shape[dim]
            shift %= size
            wrapped = label.full().narrow(dim, size - shift, shift) if call["dims"] else label.ids
            call.ledger.pin(wrapped, f"{call.where} wraps a fixed number of channels around")
    return plain(call)


def pixel_shuffle(call: Call) -> Outcome:
    """Channels become pixels and back."""
    return plain(call)


def channel_shuffle(call: Call) -> Outcome:
    """The same place of every group is tied."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    by_group = label.vector(1, call.ledger).view(call["groups"], -1)
    call.ledger.tie(by_group[:1], by_group)
    return plain(call)


def glu(call: Call) -> Outcome:
    """Gated linear unit: the halves are tied place by place."""
    label = call.label("self")
    if label is None:
        return barrier(call)
    dim = call["dim"] % len(label.shape)
    half = label.shape[dim] // 2
    ids = label.full()
    call.ledger.tie(ids.narrow(dim, 0, half), ids.narrow(dim, half, half))
    return Label.of(ids.narrow(dim, 0, half))


def gather(call: Call) -> Outcome:
    """x[:, index] or index_select: by an owned integer buffer a route that surgery can mend, else by fixed places."""
    mark = call.mark("self")
    if mark is None:
        return barrier(call)
    index = call.arguments.get("indices") or [*[None] * (call["dim"] % call.result.ndim), call["index"]]
    axis = next((i for i, entry in enumerate(index) if entry is not None), 0)
    single = sum(entry is not None for entry in index) == 1

    def move(ids: Tensor) -> Tensor:
        return aten.index(ids, index)

    if isinstance(mark, Coordinates):
        return mark.moved(move)
    touched = [i for i, entry in enumerate(index) if entry is not None and i in mark.axes]
    if not touched:
        return mark.moved(move) if isinstance(mark, Label) else barrier(call)
    source = call.marks.get(id(index[axis]))
    if not single or not isinstance(source, Coordinates) or not source.direct or index[axis].ndim != 1 or index[axis].dtype == torch.bool:
        call.ledger.pin(mark.ids, f"{call.where} takes channels by fixed places")
        return mark.moved(move)
    out = call.ledger.route(source.name, mark.vector(axis, call.ledger), index[axis])
    shape = [1] * call.result.ndim
    shape[axis] = len(out)
    return Label(out.view(shape), call.result.shape)


MOVEMENTS: dict[Any, Rule] = {
    **dict.fromkeys((aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.flip, aten.repeat), plain),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh), unchanged),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), view),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.unbind), parts),
    **dict.fromkeys((aten.pixel_shuffle, aten.pixel_unshuffle), pixel_shuffle),
    **dict.fromkeys((aten.channel_shuffle, aten.native_channel_shuffle), channel_shuffle),
    **dict.fromkeys((aten.index, aten.index_select), gather),
    aten.slice: slice_,
    aten.select: select,
    aten.cat: cat,
    aten.constant_pad_nd: pad,
    aten.roll: roll,
    aten.glu: glu,
}
