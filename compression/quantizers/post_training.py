"""Post-training quantization on linear grids (arXiv:1806.08342, arXiv:1712.05877): no training, a few images.

Weights are rounded on the grid of their range with batch norm folded in; inputs of layers on a grid that is fixed by
statistics of calibration images, cut off by one of several rules (see ``clipping``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from compression.quantizers.calibrating import measure_inputs, read_spreads
from compression.quantizers.clipping import CLIPS, Spread, clip_range
from compression.quantizers.layout import layout_of
from compression.quantizers.modes import DEFAULT_MODES, Modes, modes_of, read_modes
from compression.quantizers.overrides import Bits, read_bits
from compression.quantizers.quantizer import Quantizer
from models.quantized.layers import QuantizedLayer
from models.quantized.settings import LayerSettings
from utils.errors import UserError, unknown
from utils.options import boolean, choice, integer, number, option, optional, text

FULL = 32  # accumulators that hold every sum


@dataclass
class PostTrainLinearQuantizer(Quantizer):
    """Quantizes a trained network as it is. Where it trains on, the ranges of inputs stand still.

    Attributes:
        bits_parameters: of the weights.
        bits_accum: of the accumulators, at which sums of products saturate.
        mode: grid of inputs and weights: a name, or {activations: ..., weights: ...}.
        per_channel_wts: a grid for each output channel.
        clip_acts: which part of an input's range is kept, see ``clipping``.
        clip_n_stds: of "n_std".
        model_activation_stats: a file with statistics; without it they are measured on the images that are given.
    """

    bits_activations: int | None = option(read_bits, 8)
    bits_parameters: int | None = option(read_bits, 8)
    bits_accum: int = option(integer(2, FULL), FULL)
    mode: str | Modes = option(read_modes, DEFAULT_MODES)
    per_channel_wts: bool = option(boolean, False)
    clip_acts: str = option(choice(*CLIPS), "none")
    clip_n_stds: float = option(number(above=0), 2.0)
    model_activation_stats: str | None = option(optional(text), None)

    spreads: dict[str, Spread] = field(init=False, repr=False, compare=False, default_factory=dict)
    calibrates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bits_weights = self.bits_weights or self.bits_parameters
        if self.clip_acts not in CLIPS:
            raise unknown("clip_acts", str(self.clip_acts), CLIPS)

    def settings(self, name: str, bits: Bits) -> LayerSettings:
        modes = modes_of(self.mode)
        return LayerSettings(
            self.method,
            bits.weights,
            bits.bias,
            modes.weights,
            self.per_channel_wts,
            norm=self.layout.norms.get(name),
            bits_inputs=bits.activations if name in self.layout.run else None,
            input_mode=modes.activations,
            frozen=True,
            bits_accum=None if self.bits_accum >= FULL else self.bits_accum,
        )

    def measure(self, model: nn.Module, inputs: Tensor | None, batches: Iterable[Tensor] | None) -> None:
        if inputs is None:
            raise UserError(f"{type(self).__name__} needs a batch of inputs, to find the batch norms that it folds")
        self.layout = layout_of(model, inputs)
        if self.model_activation_stats:
            self.spreads = read_spreads(Path(self.model_activation_stats))
        else:
            self.spreads = measure_inputs(model, [inputs] if batches is None else batches)
        wanted = [name for name, bits in self.bits_of(model).items() if bits.activations and name in self.layout.run]
        if missing := [name for name in wanted if name not in self.spreads]:
            raise UserError(f"{self.model_activation_stats}: no statistics of the inputs of {', '.join(missing[:4])}")

    @torch.no_grad()
    def settle(self, model: nn.Module, inputs: Tensor | None) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLayer) and (bits := layer.settings.bits_inputs):
                low, high = clip_range(self.clip_acts, self.spreads[name], bits, self.clip_n_stds)
                layer.input_low.fill_(low)
                layer.input_high.fill_(high)
                layer.input_seen.fill_(1)
