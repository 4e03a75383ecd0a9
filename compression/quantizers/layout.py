"""What a quantizer learns about a network by running it: the batch norm after each layer, and which layers read the input."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from models.quantized.preparing import LAYER_KINDS
from utils.modes import observed

LAYERS = tuple(LAYER_KINDS)


@dataclass(frozen=True)
class Layout:
    """Names of a network's layers.

    Attributes:
        norms: layer -> the batch norm that reads its output, if each of the two runs once per forward pass.
        first: layers that read the network's input itself.
        run: layers that run at all.
    """

    norms: dict[str, str] = field(default_factory=dict)
    first: frozenset[str] = frozenset()
    run: frozenset[str] = frozenset()


def layout_of(model: nn.Module, inputs: Tensor) -> Layout:
    """Run a network on inputs in eval mode and trace its tensors from layer to layer."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[str, Tensor]] = {}  # the references keep the ids unique
    norms: dict[str, str] = {}
    first: set[str] = set()
    calls: Counter[str] = Counter()

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls[names[module]] += 1
        if arguments and arguments[0] is inputs and isinstance(module, LAYERS):
            first.add(names[module])
        if arguments and id(arguments[0]) in outputs and isinstance(module, nn.modules.batchnorm._BatchNorm):
            layer, output = outputs[id(arguments[0])]
            if module.running_var is not None and len(module.running_var) == output.shape[1]:
                norms[layer] = names[module]

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[id(output)] = (names[module], output)

    handles = []
    for module in model.modules():
        if isinstance(module, (*LAYERS, nn.modules.batchnorm._BatchNorm)):
            handles.append(module.register_forward_pre_hook(before))
        if isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(after))
    with observed(model, handles):
        model(inputs)
    once = {layer: norm for layer, norm in norms.items() if calls[layer] == calls[norm] == 1}
    return Layout(once, frozenset(first), frozenset(names[m] for m in names if isinstance(m, LAYERS) and calls[names[m]]))
