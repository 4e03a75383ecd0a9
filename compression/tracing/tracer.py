"""Run a network once and carry channel numbers beside every tensor.

The network runs as it is, in eval mode, on one example. A dispatch mode sees every primitive operation, whatever Python
code called it, and applies its rule to the numbers: the rule in a table, the element-wise rule where torch tags the
operation as point-wise, otherwise none, and then the operation is a barrier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from compression.tracing.attention import ATTENTION
from compression.tracing.channel_labels import ChannelLabel, Coordinates
from compression.tracing.contractions import CONTRACTIONS
from compression.tracing.movements import MOVEMENTS
from compression.tracing.partitions import PARTITIONS
from compression.tracing.record import OUTPUT, Contraction, TraceRecord
from compression.tracing.reductions import NORMS, REDUCTIONS
from compression.tracing.rules import (
    ELEMENTWISE,
    Call,
    Mark,
    NotFollowed,
    Outcome,
    Rule,
    aten,
    barrier,
    elementwise,
    first_tensor,
    pinned_label,
    tensors_among,
)
from utils.modes import eval_mode, observed

COMPUTE: dict[Any, Rule] = {**CONTRACTIONS, **NORMS, **ELEMENTWISE}
MOVES = {**MOVEMENTS, **PARTITIONS}
RULES: dict[Any, Rule] = {**COMPUTE, **ATTENTION, **REDUCTIONS, **MOVES}
SHAPE_ONLY = {aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full}  # only the type of their argument counts
KEEP_MAP = {aten.view, aten._unsafe_view, aten.clone, aten.alias, aten.detach, aten._to_copy}  # what they return shows the same channels
LEAKS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
DATA = vars(torch._C.TensorBase)["data"].__get__


def computes(func: Any) -> bool:
    """Whether an operation makes new values (contractions, norms, element-wise ones); ``Contraction.tap`` counts these."""
    packet = func.overloadpacket
    return packet in COMPUTE or (packet not in RULES and torch.Tag.pointwise in func.tags)


class _Tracer(TorchDispatchMode):
    """Applies the rules while the network runs."""

    def __init__(self, record: TraceRecord, inputs: Tensor) -> None:
        super().__init__()
        self.record = record
        self.modules: list[str] = []  # those that are running, the innermost last
        self.alive: list[Any] = []  # a freed tensor's identity could be taken by another
        self.marks: dict[int, Mark] = {}
        self.tainted: set[int] = set()  # storages into which channels were written behind the rules' back
        self.computed = 0
        self.calls: Counter[tuple[str, str]] = Counter()
        self.shown: dict[int, list[Contraction]] = {}  # tensor -> the contractions whose channels it shows so far
        self.at_hand: list[Tensor] = []  # what goes into the operation that runs, or what came out of the latest
        channels = record.fresh(inputs.shape[1], "the network's input")
        self.marks[id(inputs)] = ChannelLabel(channels.view(1, -1, *[1] * (inputs.ndim - 2)), inputs.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = _by_name(func, args, kwargs or {})
        self.at_hand = tensors_among(arguments.values())
        result = func(*args, **(kwargs or {}))
        self.alive.append((args, kwargs, result))
        self._follow(func, arguments, result)
        self.at_hand = tensors_among([result])
        return result

    def watch_modules(self, model: nn.Module) -> list[RemovableHandle]:
        """Keep track of the module that runs, until the handles are removed."""

        def leave(*_: Any) -> None:
            self.modules.pop()

        handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _, __, name=name: self.modules.append(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def nodes_at_hand(self) -> Tensor:
        """Return the channels of the activations at hand; where there are none, those of the parameters."""
        marks = [self.marks.get(id(tensor)) for tensor in self.at_hand]
        found = [mark.ids.reshape(-1) for mark in marks if isinstance(mark, ChannelLabel)]
        found = found or [nodes for mark in marks if isinstance(mark, Coordinates) for nodes in self.record.met(mark.name)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    def mark_of(self, tensor: Tensor) -> Mark | None:
        """Return what is known of a tensor."""
        if (mark := self.marks.get(id(tensor))) is not None:
            return mark
        if (owned := self.record.owned.get(id(tensor))) is not None:
            return self.marks.setdefault(id(tensor), Coordinates.whole(owned[0], tensor))
        if self.tainted and tensor.untyped_storage().data_ptr() in self.tainted:
            label = pinned_label(self.record, tensor, "channels were written into a part of another tensor")
            return self.marks.setdefault(id(tensor), label)
        return None

    def _follow(self, func: Any, arguments: dict[str, Any], result: Any) -> None:
        """Carry the channels through one operation."""
        computing = computes(func)
        self.computed += computing  # also where nothing is marked, so that a run without marks counts alike
        tensors = tensors_among(arguments.values())
        marks = {id(tensor): mark for tensor in tensors if (mark := self.mark_of(tensor)) is not None}
        if not marks or func.overloadpacket in SHAPE_ONLY:
            return
        call = self._call(func, arguments, result, marks)
        contractions = len(self.record.contractions)
        self._mark_results(_apply_rule(call, computing), result)
        self._touch(call)
        self._taint(call)
        self._watch_maps(call, tensors, self.record.contractions[contractions:], computing)

    def _call(self, func: Any, arguments: dict[str, Any], result: Any, marks: dict[int, Mark]) -> Call:
        module, operation = self.modules[-1] if self.modules else "", str(func.overloadpacket)
        self.calls[module, operation] += 1
        key = (module, operation, self.calls[module, operation])
        return Call(func, arguments, result, module, marks, self.record, key, self.computed)

    def _mark_results(self, outcome: Outcome, result: Any) -> None:
        results = result if isinstance(result, list | tuple) else [result]
        outcomes = outcome if isinstance(outcome, list) else [outcome] * len(results)
        for tensor, mark in zip(results, outcomes, strict=False):
            if isinstance(tensor, Tensor) and mark is not None:
                self.marks[id(tensor)] = mark

    def _touch(self, call: Call) -> None:
        """Channels of zeros stay zero only where they are moved."""
        if call.op.overloadpacket not in MOVES:
            for mark in call.marks.values():
                if isinstance(mark, ChannelLabel):
                    self.record.touch(mark.ids)

    def _taint(self, call: Call) -> None:
        """Note the storages of unmarked tensors that the call wrote to: other views of them may show its channels."""
        for argument in call.op._schema.arguments:
            tensor, alias = call[argument.name], argument.alias_info
            if alias is not None and alias.is_write and isinstance(tensor, Tensor) and id(tensor) not in call.marks:
                self.tainted.add(tensor.untyped_storage().data_ptr())

    def _watch_maps(self, call: Call, tensors: list[Tensor], made: list[Contraction], computing: bool) -> None:
        """Keep track of which tensor shows a contraction's channels as their readers will see them."""
        result = first_tensor(call.result)
        shown = [contraction for tensor in tensors for contraction in self.shown.pop(id(tensor), [])]
        if not made:
            if not isinstance(result, Tensor) or not (computing or call.op.overloadpacket in KEEP_MAP):
                return
            made = [contraction for contraction in shown if _shows(contraction, self.marks.get(id(result)), result)]
        for contraction in made if computing else ():
            contraction.tap = call.computed
        self.shown[id(result)] = self.shown.get(id(result), []) + made


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operation's arguments by name, with defaults filled in."""
    schema = func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _apply_rule(call: Call, computing: bool) -> Outcome:
    rule = RULES.get(call.op.overloadpacket) or (elementwise if computing else None)
    try:
        if rule is None:
            raise NotFollowed
        return rule(call)
    except NotFollowed as reason:
        if call.op.overloadpacket in CONTRACTIONS:
            call.record.unfollowed.setdefault(call.module, f"{call.where} {reason}")
        return barrier(call, str(reason))


def _shows(contraction: Contraction, mark: Mark | None, tensor: Tensor) -> bool:
    """Whether a tensor still shows all channels of a contraction, and nothing else."""
    if not isinstance(mark, ChannelLabel):
        return False
    width = len(contraction.out)
    return tensor.ndim == 4 and tensor.shape[1] == width if contraction.spatial else tensor.ndim > 0 and tensor.shape[-1] == width


class _Leaks(TorchFunctionMode):
    """Sees what torch's dispatcher does not: values that Python takes out, and ``x.data``."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in LEAKS or func is DATA:
            mark = self.tracer.mark_of(args[0])
            if func in LEAKS and isinstance(mark, ChannelLabel):
                self.tracer.record.pin(mark.ids, f"'{func.__name__}' takes its values out of the network")
            elif func is DATA and mark is not None:
                self.tracer.alive.append((args, result))
                self.tracer.marks[id(result)] = mark if isinstance(mark, ChannelLabel) else replace(mark, direct=False)
        return result


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, without torch's fused attention; then back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def run_traced(model: nn.Module, inputs: Tensor, record: TraceRecord) -> None:
    """Run a network on an example and fill the record.

    Args:
        model: a network on the CPU.
        inputs: one example, [1, C, H, W].
        record: an empty record, or a ``Proof`` that refuses what it does not expect.

    Raises:
        Mismatch: a proof failed.
    """
    inputs = inputs.detach().clone()
    tracer = _Tracer(record, inputs)
    try:
        with evaluating(model), observed(model, tracer.watch_modules(model)), _Leaks(tracer), tracer:
            outputs = model(inputs)
    except Exception:
        record.at_hand = tracer.nodes_at_hand()
        raise
    for output in tensors_in(outputs):
        mark = tracer.mark_of(output)
        if isinstance(mark, ChannelLabel):
            record.pin(mark.ids, OUTPUT)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an output: itself, or what is in its lists, tuples, dicts and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []
