"""What quantization-aware training has learned, for integer files: the range of every layer's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models.quantized import QuantizedLayer, clips
from models.quantized.activations import ClippedReLU
from models.quantized.numbers import limits
from utils.errors import UserError

BITS = 8


@dataclass(frozen=True)
class Learned:
    """What a network that was trained for 8 bits knows of its ranges.

    Attributes:
        inputs: scale and zero point (uint8) of each layer's input, by the layer's name.
        per_channel: whether weights have a grid per output channel.
    """

    inputs: dict[str, tuple[float, int]]
    per_channel: bool


def is_linear(model: nn.Module) -> bool:
    """Whether a network is quantized on linear grids alone, so that without the rounding it is the network in float32."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    clipped = clips(model) or any(isinstance(module, ClippedReLU) for module in model.modules())
    return bool(layers) and not clipped and all(layer.settings.method == "linear" for layer in layers)


def learned_ranges(model: nn.Module) -> Learned:
    """Return the ranges that a quantized network has learned.

    Raises:
        UserError: it was quantized in a way that no integer runtime computes.
    """
    if not is_linear(model):
        raise UserError("integer runtimes compute on linear grids alone: --int8 takes networks of QuantAwareTrainRangeLinearQuantizer")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    for name, layer in layers.items():
        settings = layer.settings
        if (settings.bits_weights or BITS) != BITS or (settings.bits_inputs or BITS) != BITS or not settings.mode.startswith("sym"):
            bits = f"{settings.bits_weights} bits for weights ({settings.mode}), {settings.bits_inputs} for inputs"
            raise UserError(f"{name} is quantized with {bits}; --int8 takes {BITS} of both and symmetric weights")
    inputs = {}
    for name, layer in layers.items():
        if layer.settings.bits_inputs:
            grid = layer.input_grid()
            shift = 0 if limits(BITS, layer.settings.input_mode)[0] == 0 else 2 ** (BITS - 1)  # signed numbers as unsigned ones
            inputs[name] = float(grid.scale), int(grid.zero_point) + shift
    per_channel = all(layer.settings.per_channel for layer in layers.values())
    return Learned(inputs, per_channel)


def fits_int8(model: nn.Module) -> bool:
    """Whether a quantized network can be written as an int8 file with its own ranges."""
    try:
        learned_ranges(model)
    except UserError:
        return False
    return True
