"""What each operation does to channels. An operation without a rule is a barrier: its channels must stay.

Data movement is done with the nodes themselves. A size may be a constant in the network's code or may follow from the
shapes (``chunk(2)``, ``view(b, groups, -1)``, ``x[:, :half]``). Each such operation is a *site* with several readings,
tried in order until a shrunk network proves one right:

0. the size follows the shape, in equal parts: the same position of each part is tied;
1. the other way round (neighbours within a part are tied; for slices: the size is a constant, so what it counts stays);
2. nothing may change here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from compression.tracing.channel_labels import ChannelLabel, Coordinates, align, strip, varying_axes
from compression.tracing.record import CallKey, TraceRecord

aten = torch.ops.aten
Mark = ChannelLabel | Coordinates  # what is known of a tensor
Outcome = Mark | None | list[Mark | None]
T = TypeVar("T")


class NotFollowed(Exception):
    """No rule covers this call, so it is a barrier; the message says what the operation does to its channels."""

    def __init__(self, what: str = "is not understood") -> None:
        super().__init__(what)


@dataclass
class Call:
    """One operation as it happened.

    Attributes:
        op: the operation.
        arguments: by name, with defaults filled in.
        result: what it returned.
        module: the module in which it happened.
        marks: what is known of the tensors among the arguments, by identity.
        key: by which a shrunk network finds it again.
        computed: how many operations that compute new values have run so far, this one included.
    """

    op: Any
    arguments: dict[str, Any]
    result: Any
    module: str
    marks: dict[int, Mark]
    record: TraceRecord
    key: CallKey
    computed: int

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def mark(self, name: str) -> Mark | None:
        """Return what is known of the tensor in an argument."""
        return self.marks.get(id(self.arguments[name]))

    def known(self, name: str) -> Mark:
        """Return what is known of the tensor in an argument.

        Raises:
            NotFollowed: nothing is.
        """
        if (mark := self.mark(name)) is None:
            raise NotFollowed
        return mark

    def label(self, name: str) -> ChannelLabel:
        """Return the channel label of the activation in an argument.

        Raises:
            NotFollowed: it is no activation.
        """
        mark = self.mark(name)
        if not isinstance(mark, ChannelLabel):
            raise NotFollowed
        return mark

    def owned(self, name: str) -> str | None:
        """Return the name of the parameter or buffer that an argument is."""
        mark = self.mark(name)
        return mark.name if isinstance(mark, Coordinates) and mark.direct else None

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie nodes at equal positions."""
        self.record.tie(a, b)

    def pin(self, nodes: Tensor, what: str) -> None:
        """Pin nodes because of what the call does."""
        self.record.pin(nodes, f"{self.where} {what}")

    def reading(self, nodes: Tensor, in_parts: bool = True) -> int:
        """Return the reading to take of this site, which the nodes pass; see ``TraceRecord.site``."""
        return self.record.site(self.key, nodes, in_parts)

    def decide(self, what: str, value: T) -> T:
        """Take a decision that follows from where channels vary: a shrunk network, with one channel left, repeats it."""
        return self.record.decide((self.key, what), value)

    @property
    def where(self) -> str:
        """The operation and its module, for reasons."""
        name = str(self.op.overloadpacket).removeprefix("aten.").strip("_")
        return f"'{name}' in {self.module or 'the network'}"


Rule = Callable[[Call], Outcome]


def barrier(call: Call, what: str) -> Outcome:
    """Pin every channel that comes in; the result's channels are pinned too."""
    for mark in call.marks.values():
        if isinstance(mark, ChannelLabel):
            call.pin(mark.ids, what)
        else:
            for dim in range(len(mark.positions)):
                call.pin(call.record.nodes(mark.name, dim), what)
    results = call.result if isinstance(call.result, list | tuple) else [call.result]
    if not any(isinstance(mark, ChannelLabel) for mark in call.marks.values()):
        return [None] * len(results)
    reason = f"{call.where} {what}"
    return [pinned_label(call.record, result, reason) if isinstance(result, Tensor) else None for result in results]


def pinned_label(record: TraceRecord, tensor: Tensor, reason: str) -> ChannelLabel:
    """Return a label of one new channel, which must stay, at all positions of a tensor."""
    return ChannelLabel(record.fresh(1, reason).reshape((1,) * tensor.ndim), tensor.shape)


def elementwise(call: Call) -> Outcome:
    """Tie what meets at equal positions; per-channel parameters follow their channels."""
    result = first_tensor(call.result)
    if not isinstance(result, Tensor):
        raise NotFollowed
    tensors = tensors_among(call.arguments.values())
    labels = [mark for tensor in tensors if isinstance(mark := call.marks.get(id(tensor)), ChannelLabel)]
    parameters = [(tensor, mark) for tensor in tensors if isinstance(mark := call.marks.get(id(tensor)), Coordinates)]
    constants = [tensor for tensor in tensors if id(tensor) not in call.marks]
    if not labels:
        return _changed_parameter(call, parameters, constants)
    if any(tensor is call.result for tensor, _ in parameters):
        raise NotFollowed  # an activation is kept in a buffer
    main = _tie_labels(call, labels, result.ndim)
    axes = varying_axes(main)
    for tensor, mark in parameters:
        tie_parameter(call, tensor, mark, main)
    for tensor in constants:
        offset = result.ndim - tensor.ndim
        if any(offset + axis in axes and size > 1 for axis, size in enumerate(tensor.shape)):
            call.pin(main, "combines it with a tensor of a fixed size")
    return ChannelLabel(main, result.shape)


def _changed_parameter(call: Call, parameters: list[tuple[Tensor, Coordinates]], constants: list[Tensor]) -> Outcome:
    """Follow one parameter through its sign, its scaling and the like, which keep each element in its place."""
    if len(parameters) != 1 or any(tensor.numel() != 1 for tensor in constants):
        raise NotFollowed
    tensor, mark = parameters[0]
    in_place = mark.positions and first_tensor(call.result).shape == mark.positions[0].shape
    return replace(mark, direct=call.result is tensor) if in_place else None


def _tie_labels(call: Call, labels: list[ChannelLabel], ndim: int) -> Tensor:
    """Tie the channels of activations that meet; return those of the one that varies along the most axes."""
    aligned = [strip(align(label.ids, ndim)) for label in labels]
    most = call.decide("most", max(range(len(aligned)), key=lambda i: len(varying_axes(aligned[i]))))
    main = aligned[most]
    axes = varying_axes(main)
    if call.decide("apart", any(not varying_axes(ids) <= axes for ids in aligned)):
        raise NotFollowed
    for i, ids in enumerate(aligned):
        if call.decide(f"meets {i}", varying_axes(ids) == axes):
            call.tie(ids, main)
        else:
            call.pin(ids, "spreads it over other channels")
    for i, label in enumerate(labels):
        offset = ndim - len(label.shape)
        untold = any(offset + axis in axes and axis not in label.axes for axis, size in enumerate(label.shape) if size > 1)
        if call.decide(f"untold {i}", untold):
            call.pin(main, "combines it with channels that are not told apart")
    return main


def tie_parameter(call: Call, tensor: Tensor, mark: Coordinates, main: Tensor) -> None:
    """Tie the slots of a parameter to the channels at whose positions they stand."""
    axes, offset = varying_axes(main), main.ndim - tensor.ndim
    if call.decide("one value", not axes and tensor.numel() == 1):  # it goes with the one channel
        for dim in range(len(mark.positions)):
            call.tie(call.record.nodes(mark.name, dim), main)
    for dim, positions in enumerate(mark.positions):
        positions = strip(positions)
        moving = {offset + axis for axis in varying_axes(positions)}
        if moving & axes:
            if len(moving) > 1:
                raise NotFollowed
            call.tie(align(call.record.nodes(mark.name, dim)[positions], main.ndim), main)


def first_tensor(result: Any) -> Tensor:
    """Return an operation's result, or the first of several."""
    found: Tensor = result[0] if isinstance(result, list | tuple) and result else result
    return found


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values and in the lists among them."""
    items = (item for value in values for item in (value if isinstance(value, list | tuple) else [value]))
    return [item for item in items if isinstance(item, Tensor)]


ELEMENTWISE: dict[Any, Rule] = dict.fromkeys(  # torch tags all others as point-wise
    (
        *(aten._prelu_kernel, aten.hardswish, aten.hardswish_, aten.log_sigmoid_forward, aten.copy_, aten.fill_, aten.zero_),
        *(aten.masked_fill_, aten.mish_, aten.gelu_, aten.threshold_),
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),  # the same everywhere, so they follow any cut
    ),
    elementwise,
)
