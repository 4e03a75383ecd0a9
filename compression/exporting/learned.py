"""What quantization-aware training has learned, for integer files: the range of every layer's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.quantized import QuantizedLayer, clips, is_quantized, plain_copy
from models.quantized.activations import ClippedReLU
from models.quantized.numbers import limits
from utils.errors import UserError

BITS = 8


@dataclass(frozen=True)
class Learned:
    """A network that was trained for 8 bits.

    Attributes:
        plain: the same network without quantization, whose weights the runtime rounds as training did.
        inputs: scale and zero point (uint8) of each layer's input, by the layer's name.
        per_channel: whether weights have a grid per output channel.
    """

    plain: nn.Module
    inputs: dict[str, tuple[float, int]]
    per_channel: bool


def learned_ranges(model: nn.Module) -> Learned | None:
    """Return what a network has learned; None for one that is not quantized.

    Raises:
        UserError: it was quantized in a way that no integer runtime computes.
    """
    if not is_quantized(model):
        return None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    other = next((name for name, layer in layers.items() if layer.settings.method != "linear"), "")
    if other or clips(model) or any(isinstance(module, ClippedReLU) for module in model.modules()):
        raise UserError("integer runtimes compute on linear grids alone: --int8 takes QuantAwareTrainRangeLinearQuantizer's networks")
    for name, layer in layers.items():
        settings = layer.settings
        if (settings.bits_weights or BITS) != BITS or (settings.bits_inputs or BITS) != BITS or not settings.mode.startswith("sym"):
            bits = f"{settings.bits_weights} bits for weights ({settings.mode}), {settings.bits_inputs} for inputs"
            raise UserError(f"{name} was trained with {bits}; --int8 takes {BITS} of both and symmetric weights")
    inputs = {}
    for name, layer in layers.items():
        if layer.settings.bits_inputs:
            grid = layer.input_grid()
            shift = 0 if limits(BITS, layer.settings.input_mode)[0] == 0 else 2 ** (BITS - 1)  # signed numbers as unsigned ones
            inputs[name] = float(grid.scale), int(grid.zero_point) + shift
    per_channel = all(layer.settings.per_channel for layer in layers.values())
    return Learned(plain_copy(model).eval(), inputs, per_channel)
