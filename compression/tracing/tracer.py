"""Run a network once and carry channel numbers beside every tensor.

The network runs as it is, in eval mode, on one example; a dispatch mode sees every primitive operation, whatever Python
code called it, and applies its rule to the numbers. Operations that torch tags as point-wise are element-wise; those
with a rule in a table follow it; every other one is a barrier.
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

from compression.tracing.channel_labels import ChannelLabel, Coordinates
from compression.tracing.contractions import ATTENTION, CONTRACTIONS
from compression.tracing.movements import MOVEMENTS
from compression.tracing.partitions import PARTITIONS
from compression.tracing.record import Mismatch, TraceRecord
from compression.tracing.reductions import NORMS, REDUCTIONS
from compression.tracing.rules import ELEMENTWISE, Call, Mark, Outcome, Rule, aten, barrier, elementwise
from utils.modes import eval_mode

COMPUTE: dict[Any, Rule] = {**CONTRACTIONS, **NORMS, **ELEMENTWISE}
MOVES = {**MOVEMENTS, **PARTITIONS}
RULES: dict[Any, Rule] = {**COMPUTE, **ATTENTION, **REDUCTIONS, **MOVES}
SHAPE_ONLY = {aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full}  # only the type of their argument counts


def computes(func: Any) -> bool:
    """Whether an operation makes new values (contractions, norms, element-wise ones); ``Contraction.tap`` counts these."""
    packet = func.overloadpacket
    return packet in COMPUTE or (packet not in RULES and torch.Tag.pointwise in func.tags)


class _Tracer(TorchDispatchMode):
    """Applies the rules while the network runs."""

    def __init__(self, record: TraceRecord, inputs: Tensor) -> None:
        super().__init__()
        self.record = record
        self.modules: list[str] = []
        self.alive: list[Any] = []  # a freed tensor's identity could be taken by another
        self.marks: dict[int, Mark] = {}
        self.tainted: set[int] = set()
        self.computed = 0
        self.followed: Counter[tuple[str, str]] = Counter()
        self.pending: dict[int, list[int]] = {}  # tensor -> contractions whose map it is so far
        channels = record.fresh(inputs.shape[1], "the network's input")
        self.marks[id(inputs)] = ChannelLabel(channels.view(1, -1, *[1] * (inputs.ndim - 2)), inputs.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive.append((args, kwargs, result))
        self._follow(func, args, kwargs or {}, result)
        return result

    def leave(self, *_: Any) -> None:
        """Note that the innermost module has returned."""
        self.modules.pop()

    def mark_of(self, tensor: Tensor) -> Mark | None:
        """Return what is known of a tensor."""
        if (mark := self.marks.get(id(tensor))) is not None:
            return mark
        if (owned := self.record.owned.get(id(tensor))) is not None:
            return self.marks.setdefault(id(tensor), Coordinates.whole(owned[0], tensor))
        if self.tainted and tensor.untyped_storage().data_ptr() in self.tainted:
            node = self.record.fresh(1, "channels were written into a part of another tensor")
            return self.marks.setdefault(id(tensor), ChannelLabel(node.reshape((1,) * tensor.ndim), tensor.shape))
        return None

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        packet, schema, computing = func.overloadpacket, func._schema, computes(func)
        self.computed += computing  # of every operation, so that a run without marks counts alike
        positional = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
        arguments = {a.name: {**positional, **kwargs}.get(a.name, a.default_value) for a in schema.arguments}
        tensors = [
            t for value in arguments.values() for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)
        ]
        marks = {id(t): mark for t in tensors if (mark := self.mark_of(t)) is not None}
        if not marks or packet in SHAPE_ONLY:
            return
        where = self.modules[-1] if self.modules else ""
        alike = (where, str(packet))
        self.followed[alike] += 1
        call = Call(func, arguments, result, where, marks, self.record, (*alike, self.followed[alike]), self.computed)
        rule = RULES.get(packet) or (elementwise if computing else barrier)
        before = len(self.record.contractions)
        written = [arguments[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self._keep(rule(call), result)
        if packet not in MOVES:
            for mark in marks.values():
                if isinstance(mark, ChannelLabel):
                    self.record.touch(mark.ids)
        for tensor in written:
            if isinstance(tensor, Tensor) and id(tensor) not in marks:
                self.tainted.add(tensor.untyped_storage().data_ptr())
        self._watch(call, tensors, before, computing)

    def _keep(self, outcome: Outcome, result: Any) -> None:
        results = result if isinstance(result, list | tuple) else [result]
        outcomes = outcome if isinstance(outcome, list) else [outcome] * len(results)
        for tensor, mark in zip(results, outcomes, strict=False):
            if isinstance(tensor, Tensor) and mark is not None:
                self.marks[id(tensor)] = mark

    def _watch(self, call: Call, tensors: list[Tensor], before: int, computing: bool) -> None:
        """Keep track of which tensor shows a contraction's channels as their readers will see them."""
        result = call.result[0] if isinstance(call.result, list | tuple) and call.result else call.result
        held = [i for t in tensors for i in self.pending.pop(id(t), [])]
        if len(self.record.contractions) > before:
            made = [before]
        elif isinstance(result, Tensor) and (computing or call.op.overloadpacket in _CARRIES):
            made = [i for i in held if _same_map(self.record.contractions[i], self.marks.get(id(result)), result)]
        else:
            return
        for i in made:
            if computing:
                self.record.contractions[i].tap = call.computed
        self.pending[id(result)] = self.pending.get(id(result), []) + made


class _Leaks(TorchFunctionMode):
    """Sees what leaves the sight of torch's dispatcher: values that Python takes out, and ``x.data``."""

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


LEAKS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
DATA = vars(torch._C.TensorBase)["data"].__get__
_CARRIES = {aten.view, aten._unsafe_view, aten.clone, aten.alias, aten.detach, aten._to_copy}


def _same_map(contraction: Any, mark: Mark | None, result: Tensor) -> bool:
    """Whether a tensor still shows all channels of a contraction, and nothing else."""
    if not isinstance(mark, ChannelLabel):
        return False
    width = len(contraction.out)
    return result.ndim == 4 and result.shape[1] == width if contraction.spatial else result.ndim > 0 and result.shape[-1] == width


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


@contextmanager
def observed(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Tell the tracer which module runs."""
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, __, name=name: tracer.modules.append(name)))
        handles.append(module.register_forward_hook(tracer.leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_traced(model: nn.Module, inputs: Tensor, record: TraceRecord) -> TraceRecord:
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
    with torch.no_grad(), evaluating(model), observed(model, tracer), _Leaks(tracer), tracer:
        outputs = model(inputs)
    for output in tensors_in(outputs):
        mark = tracer.mark_of(output)
        if isinstance(mark, ChannelLabel):
            record.pin(mark.ids, "the network's output")
    return record


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an output: itself, or what is in its lists, tuples, dicts and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


__all__ = ["RULES", "Mismatch", "run_traced", "tensors_in"]
