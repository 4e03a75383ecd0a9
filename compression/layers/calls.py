"""Where a forward pass calls its convolutions and linear layers, what normalises their outputs and what is added to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compression.tracing.record import owned_tensors
from compression.tracing.tracer import tensors_in

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # spatial dimensions
TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
LAYERS = {*CONVOLUTIONS, *TRANSPOSED, F.linear}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear layer, the only one with its weight.

    Attributes:
        number: of the call, among the calls of the forward pass that return a tensor.
        weight: the parameter's name.
        norm: the batch norm that alone reads the output; "" if there is none.
        addend: the call whose result is added to the (normalised) output, if it was made before this one: the shortcut
            of a residual block.
    """

    number: int
    weight: str
    norm: str = ""
    addend: int | None = None


class ForwardCalls(TorchFunctionMode):
    """Hands each call of a forward pass that returns a tensor to ``on_call``, with its number.

    A network that is cut makes the same calls in the same order, so a number names the same call in both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.on_call(self.number, func, args, kwargs or {})
        self.number += isinstance(result, Tensor)
        return result

    def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Make the call and return its result."""
        return func(*args, **kwargs)


class _Finder(ForwardCalls):
    """Notes the layers, who reads whose result, and the operands of sums."""

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__()
        self.images = images
        self.names = {key: name for key, (name, _) in owned_tensors(model).items()}
        self.alive: list[Any] = []  # so that no id is used twice
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.uses: Counter[str] = Counter()  # calls that take a parameter
        self.weights: dict[int, str] = {}
        self.apart: set[int] = set()  # layers whose first dimension is that of the images
        self.norms: dict[int, str] = {}
        self.operands: dict[int, list[int | None]] = {}

    def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inputs = tensors_in([list(args), kwargs])
        makers = [self.maker.get(id(tensor)) for tensor in inputs]
        self.uses.update({name for tensor in inputs if (name := self.names.get(id(tensor)))})
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        self.alive += [inputs, result]
        for maker in {maker for maker in makers if maker is not None}:
            self.readers.setdefault(maker, []).append(number)
        self.maker[id(result)] = number
        if func in LAYERS and (name := self.names.get(id(args[1]))):
            self.weights[number] = name
            self.apart.update([number] if len(args[0]) == len(result) == self.images else [])
        elif func in (F.batch_norm, torch.batch_norm):
            statistics = self.names.get(id(args[1 if func is F.batch_norm else 3]), "")
            self.norms[number] = statistics.removesuffix("running_mean").rstrip(".") if statistics else ""
        elif func in SUMS and len(makers) == 2 and inputs[0].shape == inputs[1].shape:
            self.operands[number] = makers
        return result

    def only_reader(self, number: int) -> int | None:
        readers = self.readers.get(number, [])
        return readers[0] if len(readers) == 1 else None

    def layer(self, number: int) -> LayerCall:
        """Follow a layer's output through its norm into a sum, as long as nothing else reads it."""
        norm, output = "", number
        reader = self.only_reader(number)
        if reader is not None and self.norms.get(reader):
            norm, output = self.norms[reader], reader
            reader = self.only_reader(reader)
        addend = None
        if reader is not None and reader in self.operands:
            others = [maker for maker in self.operands[reader] if maker != output]
            addend = others[0] if others and others[0] is not None and others[0] < number else None
        return LayerCall(number, self.weights[number], norm, addend)


@torch.no_grad()
def find_layer_calls(model: nn.Module, example: Tensor) -> dict[int, LayerCall]:
    """Return a forward pass's calls of layers by their numbers.

    Weights that are used more than once are left out, and layers that do not take the images one by one.
    """
    with _Finder(model, len(example)) as finder:
        model(example)
    return {number: finder.layer(number) for number in sorted(finder.apart) if finder.uses[finder.weights[number]] == 1}
