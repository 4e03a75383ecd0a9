"""What each operation does to channels. An operation without a rule here is a barrier: its channels must stay.

Data movement is done with the nodes themselves. Some sizes may be constants in the network's code or follow from the
shapes (``chunk(2)``, ``view(b, groups, -1)``, ``x[:, :half]``); each such place is a *site* with several readings,
tried in order until a shrunk network proves one right:

0. the size follows the shape, in equal parts: the same place of each part is tied;
1. the other way round (neighbours within a part are tied; for slices: the size is a constant, so what it counts stays);
2. nothing may change here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, align, strip
from compression.tracing.record import Key, TraceRecord

aten = torch.ops.aten
Mark = ChannelLabel | Coordinates
T = TypeVar("T")


@dataclass
class Call:
    """One operation as it happened.

    Attributes:
        arguments: by name, with defaults filled in.
        module: in which it happened.
        marks: what is known of the tensors among the arguments, by identity.
        key: the module, the operation and its number among those alike there, by which a shrunk network finds it again.
        computed: counts those that compute new values.
    """

    op: Any
    arguments: dict[str, Any]
    result: Any
    module: str
    marks: dict[int, Mark]
    record: TraceRecord
    key: Key
    computed: int

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def mark(self, name: str) -> Mark | None:
        """Return what is known of the tensor in an argument."""
        return self.marks.get(id(self.arguments[name]))

    def label(self, name: str) -> ChannelLabel | None:
        """Return the channel label of the activation in an argument."""
        mark = self.mark(name)
        return mark if isinstance(mark, ChannelLabel) else None

    def owned(self, name: str) -> str | None:
        """Return the name of the parameter or buffer that an argument is."""
        mark = self.mark(name)
        return mark.name if isinstance(mark, Coordinates) and mark.direct else None

    def decide(self, what: str, value: T) -> T:
        """Take a decision that follows from where channels vary: a shrunk network, with one channel left, repeats it."""
        return self.record.decide((self.key, what), value)

    @property
    def where(self) -> str:
        """The operation and its module, for reasons."""
        name = str(self.op.overloadpacket).removeprefix("aten.").strip("_")
        return f"'{name}' in {self.module or 'the network'}"


Outcome = Mark | None | list[Mark | None]
Rule = Callable[[Call], Outcome]


def barrier(call: Call, what: str = "is not understood") -> Outcome:
    """Pin every channel that comes in; the result's channels are pinned too."""
    reason = f"{call.where} {what}"
    for mark in call.marks.values():
        pin_mark(call, mark, reason)
    results = call.result if isinstance(call.result, list | tuple) else [call.result]
    outcome: list[Mark | None] = []
    for result in results:
        known = isinstance(result, Tensor) and any(isinstance(mark, ChannelLabel) for mark in call.marks.values())
        outcome.append(_pinned(call, result, reason) if known else None)
    return outcome


def pin_mark(call: Call, mark: Mark, reason: str) -> None:
    """Pin all channels of an activation, or all slots of a parameter."""
    if isinstance(mark, ChannelLabel):
        call.record.pin(mark.ids, reason)
    else:
        for dim in range(len(mark.places)):
            call.record.pin(call.record.nodes(mark.name, dim), reason)


def _pinned(call: Call, result: Tensor, reason: str) -> ChannelLabel:
    node = call.record.fresh(1, reason)
    return ChannelLabel(node.reshape((1,) * result.ndim), result.shape)


def elementwise(call: Call) -> Outcome:
    """Tie what meets at equal positions; per-channel parameters follow their channels."""
    if not isinstance(first_tensor(call.result), Tensor):
        return barrier(call)
    record, shape = call.record, first_tensor(call.result).shape
    tensors = [value for value in _flat(call.arguments.values()) if isinstance(value, Tensor)]
    labels = [mark for value in tensors if isinstance(mark := call.marks.get(id(value)), ChannelLabel)]
    parameters = [(value, mark) for value in tensors if isinstance(mark := call.marks.get(id(value)), Coordinates)]
    constants = [value for value in tensors if id(value) not in call.marks]
    if not labels:
        if len(parameters) == 1 and all(value.numel() == 1 for value in constants):
            mark = parameters[0][1]  # sign changes, scaling and the like keep each element in its place
            direct = call.result is parameters[0][0]
            return replace(mark, direct=direct) if mark.places and shape == mark.places[0].shape else None
        return barrier(call)
    if any(value is call.result for value, _ in parameters):
        return barrier(call)  # an activation is kept in a buffer
    aligned = [strip(align(label.ids, len(shape))) for label in labels]
    most = max(range(len(aligned)), key=lambda i: len(_varying(aligned[i])))
    most = call.decide("most", most)
    main = aligned[most]
    axes = _varying(main)
    if call.decide("apart", any(not _varying(ids) <= axes for ids in aligned)):
        return barrier(call)
    for i, ids in enumerate(aligned):
        if call.decide(f"meets {i}", _varying(ids) == axes):
            record.tie(ids, main)
        else:
            record.pin(ids, f"{call.where} spreads it over other channels")
    for i, label in enumerate(labels):
        offset = len(shape) - len(label.shape)
        untold = any(offset + axis in axes and axis not in label.axes for axis, size in enumerate(label.shape) if size > 1)
        if call.decide(f"untold {i}", untold):
            record.pin(main, f"{call.where} combines it with channels that are not told apart")
    for value, mark in parameters:
        offset = len(shape) - value.ndim
        if call.decide("one value", not axes and value.numel() == 1):  # it goes with the one channel
            for dim in range(len(mark.places)):
                record.tie(record.nodes(mark.name, dim), main)
        for dim, place in enumerate(mark.places):
            place = strip(place)
            moving = {offset + axis for axis, size in enumerate(place.shape) if size > 1}
            if not moving & axes:
                continue
            if len(moving) > 1:
                return barrier(call)
            record.tie(align(record.nodes(mark.name, dim)[place], len(shape)), main)
    for value in constants:
        offset = len(shape) - value.ndim
        if any(offset + axis in axes for axis, size in enumerate(value.shape) if size > 1):
            record.pin(main, f"{call.where} combines it with a tensor of a fixed size")
    return ChannelLabel(main, shape)


def _varying(ids: Tensor) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(ids.shape) if size > 1)


def first_tensor(result: Any) -> Tensor:
    """Return an operation's result, or the first of several."""
    found: Tensor = result[0] if isinstance(result, list | tuple) else result
    return found


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]


ELEMENTWISE: dict[Any, Rule] = dict.fromkeys(  # torch tags all others as point-wise
    (
        *(aten._prelu_kernel, aten.hardswish, aten.hardswish_, aten.log_sigmoid_forward, aten.copy_, aten.fill_, aten.zero_),
        *(aten.masked_fill_, aten.mish_, aten.gelu_, aten.threshold_),
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),  # the same everywhere, so they follow any cut
    ),
    elementwise,
)
