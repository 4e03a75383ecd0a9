"""Repeated forward passes of one network on the same images, each from the first call that a changed tensor reaches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from compression.tracing.record import owned_tensors
from compression.tracing.tracer import tensors_in

PLAIN = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
ALWAYS = 1 << 60  # the last use of what the network returns
Made = tuple[int, int]  # a tensor: the call that made it, and its place among that call's results


@dataclass(frozen=True)
class _Argument:
    """A result that is one of the call's own tensors: what works in place returns it."""

    place: int


@dataclass(frozen=True)
class _New:
    """A result that the call made."""

    made: Made
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Tape:
    """What one forward pass did, call by call.

    Attributes:
        results: of each call, with ``_New`` or ``_Argument`` for each tensor.
        last_use: the last call that takes a tensor.
        first_use: the first call that takes a parameter or buffer, by its name.
        complete: whether the results are tensors and plain values only; otherwise no call is left out.
    """

    results: list[Any] = field(default_factory=list)
    last_use: dict[Made, int] = field(default_factory=dict)
    first_use: dict[str, int] = field(default_factory=dict)
    complete: bool = True


class Replay:
    """A network's outputs on some images, again and again with other values in its parameters.

    What comes before the first call that takes a changed tensor is not computed anew: the tensors that are still needed
    there are kept, for one place in the network at a time. Going forward from change to change costs one pass in all.

    Args:
        model: in the mode in which it is to run; its calls do not depend on what the parameters are.
        batches: of its inputs.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, batches
        self.tapes: list[_Tape] = []
        self.kept: list[dict[Made, Tensor]] = [{} for _ in batches]
        self.start = 0
        names = {key: name for key, (name, _) in owned_tensors(model).items()}
        self.unchanged: list[Tensor] = []
        for batch in batches:
            with _Recording(names) as recording:
                output = model(batch)
            recording.use(tensors_in(output), ALWAYS)
            self.tapes.append(recording.tape)
            self.unchanged.append(output)

    @torch.no_grad()
    def outputs(self, changed: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of each batch with other values in some parameters and buffers; the old ones are put back."""
        self._go_to(self._first_use(changed))
        tensors = {name: tensor for name, tensor in self.model.state_dict().items() if name in changed}
        old = {name: tensor.clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.copy_(changed[name])
        try:
            return [self._run(number, None) for number in range(len(self.batches))]
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(old[name])

    def _first_use(self, changed: Collection[str]) -> int:
        if not all(tape.complete for tape in self.tapes):
            return 0
        return min((tape.first_use.get(name, ALWAYS) for tape in self.tapes for name in changed), default=0)

    def _go_to(self, call: int) -> None:
        """Keep what is needed from a call on."""
        call = min(call, *(len(tape.results) for tape in self.tapes))
        if call < self.start:
            self.start, self.kept = 0, [{} for _ in self.batches]
        if call > self.start:
            self.kept = [self._run(number, call) for number in range(len(self.batches))]
            self.start = call

    def _run(self, number: int, until: int | None) -> Any:
        """Run from ``start``; return the output, or what is needed from the call ``until`` on."""
        with _Replaying(self.tapes[number], self.start, _copies(self.kept[number]), until) as replaying:
            try:
                output = self.model(self.batches[number])
            except _Reached:
                output = None
        return output if until is None else _copies(replaying.held)


class _Recording(TorchFunctionMode):
    """Notes the calls of a forward pass."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.tape = names, _Tape()
        self.made: Any = WeakIdKeyDictionary()  # tensor -> where it was made

    def use(self, tensors: Sequence[Tensor], call: int) -> None:
        for tensor in tensors:
            if name := self.names.get(id(tensor)):
                self.tape.first_use.setdefault(name, call)
            elif tensor in self.made:
                self.tape.last_use[self.made[tensor]] = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, taken = len(self.tape.results), tensors_in([list(args), kwargs or {}])
        self.use(taken, call)
        places = {id(tensor): place for place, tensor in reversed(list(enumerate(taken)))}
        result = func(*args, **(kwargs or {}))
        leaves, tree = pytree.tree_flatten(result)
        self.tape.results.append(pytree.tree_unflatten([self._note(leaf, (call, i), places) for i, leaf in enumerate(leaves)], tree))
        return result

    def _note(self, leaf: Any, made: Made, places: Mapping[int, int]) -> Any:
        if not isinstance(leaf, Tensor):
            self.tape.complete &= isinstance(leaf, PLAIN)
            return leaf
        if id(leaf) in places:
            return _Argument(places[id(leaf)])
        self.made[leaf] = made
        return _New(made, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)


class _Reached(Exception):
    """A pass has come to the call at which it was to end."""


class _Replaying(TorchFunctionMode):
    """Answers the calls before ``start`` from the tape; holds what is needed from the call ``until`` on."""

    def __init__(self, tape: _Tape, start: int, kept: Mapping[Made, Tensor], until: int | None) -> None:
        super().__init__()
        self.tape, self.start, self.kept, self.until = tape, start, kept, until
        self.number = 0
        self.held: dict[Made, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.number == self.until:
            raise _Reached
        note, skipped = self.tape.results[self.number], self.number < self.start
        self.number += 1
        if not skipped:
            result = func(*args, **(kwargs or {}))
        else:
            taken = tensors_in([list(args), kwargs or {}])
            result = pytree.tree_map(lambda leaf: self._answer(leaf, taken), note)
        if self.until is not None:
            for leaf, tensor in zip(pytree.tree_leaves(note), pytree.tree_leaves(result), strict=True):
                if isinstance(leaf, _New) and self.tape.last_use.get(leaf.made, -1) >= self.until:
                    self.held[leaf.made] = tensor
        return result

    def _answer(self, leaf: Any, taken: Sequence[Tensor]) -> Any:
        if isinstance(leaf, _Argument):
            return taken[leaf.place]
        if isinstance(leaf, _New):  # what is not needed any more has no values
            kept = self.kept.get(leaf.made)
            return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device) if kept is None else kept
        return leaf


def _copies(tensors: Mapping[Made, Tensor]) -> dict[Made, Tensor]:
    """Copy tensors so that those which share memory share it again: some are written into in place."""
    storages: dict[int, Any] = {}
    found = {}
    for made, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        empty, copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device), storages[storage.data_ptr()]
        found[made] = empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
    return found
