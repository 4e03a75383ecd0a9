"""The ranges that a network has learned in quantization-aware training, for int8 files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from models.quantized.activations import ClippedReLU
from models.quantized.layers import QuantizedLayer
from models.quantized.numbers import limits
from models.quantized.preparing import LAYER_KINDS, clips
from utils.errors import UserError

BITS = 8


@dataclass(frozen=True)
class LearnedRanges:
    """The ranges of a network that was trained for 8 bits.

    Attributes:
        inputs: scale and zero point (uint8) of each layer's input, by the layer's name.
        weights: scales of each layer's weights with batch norm folded in: one, or one per output channel.
        in_float: layers whose weights or inputs were not quantized; they remain in float.
    """

    inputs: dict[str, tuple[float, int]]
    weights: dict[str, NDArray[np.float32]]
    in_float: frozenset[str]

    @property
    def per_channel(self) -> bool:
        """Whether weights have a grid per output channel."""
        return any(len(scales) > 1 for scales in self.weights.values())


def is_linear(model: nn.Module) -> bool:
    """Whether all quantization of a network is on linear grids; without the rounding it is then the float32 network."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    clipped = clips(model) or any(isinstance(module, ClippedReLU) for module in model.modules())
    return bool(layers) and not clipped and all(layer.settings.method == "linear" for layer in layers)


def learned_ranges(model: nn.Module) -> LearnedRanges:
    """Return the ranges that a quantized network has learned.

    Raises:
        UserError: no integer runtime computes what the network was trained for.
    """
    if not is_linear(model):
        raise UserError(
            "integer runtimes know only linear grids, so --int8 takes no other networks than QuantAwareTrainRangeLinearQuantizer's"
        )
    all_layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(LAYER_KINDS))}
    layers = {
        name: layer
        for name, layer in all_layers.items()
        if isinstance(layer, QuantizedLayer) and layer.settings.bits_weights and layer.settings.bits_inputs
    }
    for name, layer in layers.items():
        settings = layer.settings
        if settings.bits_weights != BITS or settings.bits_inputs != BITS or not settings.mode.startswith("sym"):
            bits = f"{settings.bits_weights} bits for weights ({settings.mode}), {settings.bits_inputs} for inputs"
            raise UserError(f"{name} is quantized with {bits}; --int8 takes {BITS} of both and symmetric weights")
    if not layers:
        raise UserError("no layer has both its weights and its inputs quantized, so none would run in int8; leave --int8 out")
    inputs, weights = {}, {}
    for name, layer in layers.items():
        grid = layer.input_grid()
        shift = 2 ** (BITS - 1) if limits(BITS, layer.settings.input_mode)[0] < 0 else 0  # from signed to unsigned numbers
        inputs[name] = float(grid.scale), int(grid.zero_point) + shift
        weights[name] = layer.weight_grid().scale.detach().flatten().numpy()
    return LearnedRanges(inputs, weights, frozenset(all_layers.keys() - layers.keys()))


def fits_int8(model: nn.Module) -> bool:
    """Whether a quantized network can be written as an int8 file with its own ranges."""
    try:
        learned_ranges(model)
    except UserError:
        return False
    return True
