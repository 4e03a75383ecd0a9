"""Post-training quantization on linear grids (arXiv:1806.08342, arXiv:1712.05877): no training, only a few images.

Weights are rounded to the grid of their range with batch norm folded in; layer inputs to a grid that is fixed by statistics
of calibration images, clipped by one of several rules (see ``clipping``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.quantizers.clipping import CLIPS, InputStatistics, clip_range
from compression.quantizers.input_statistics import measure_input_statistics, read_input_statistics
from compression.quantizers.linear_grid import LinearGridQuantizer
from compression.quantizers.overrides import Bits, read_bits, read_clipped_overrides
from models.quantized.layers import QuantizedLayer
from models.quantized.settings import LayerSettings
from utils.errors import UserError, unknown
from utils.options import boolean, choice, integer, number, option, optional, text

FULL = 32  # accumulators that hold every sum


@dataclass
class PostTrainLinearQuantizer(LinearGridQuantizer):
    """Quantizes a trained network as it is. If training continues, the ranges of inputs stay fixed.

    Attributes:
        bits_parameters: of the weights.
        bits_accum: of the accumulators, at which sums of products saturate.
        clip_acts: which part of an input's range is kept, see ``clipping``.
        clip_n_stds: the number of standard deviations for "n_std".
        model_activation_stats: a file with statistics; without it they are measured on the given images.
        inputs_quant_auto_fallback: Distiller's; inputs always have settings of their own here, so it changes nothing.
        overrides: also clip_acts and clip_n_stds, see ``read_clipped_overrides``.
    """

    bits_parameters: int | None = option(read_bits, 8)
    bits_accum: int = option(integer(2, FULL), FULL)
    clip_acts: str = option(choice(*CLIPS), "none")
    clip_n_stds: float = option(number(above=0), 2.0)
    model_activation_stats: str | None = option(optional(text), None)
    inputs_quant_auto_fallback: bool = option(boolean, True)
    overrides: Mapping[str, Mapping[str, Any]] | None = option(read_clipped_overrides, None)

    input_statistics: dict[str, InputStatistics] = field(init=False, repr=False, compare=False, default_factory=dict)
    clips: dict[str, tuple[str | None, float | None]] = field(init=False, repr=False, compare=False, default_factory=dict)
    calibrates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bits_weights = self.bits_weights or self.bits_parameters
        if self.clip_acts not in CLIPS:
            raise unknown("clip_acts", str(self.clip_acts), CLIPS)

    def settings(self, name: str, bits: Bits) -> LayerSettings:
        return self.layer_settings(name, bits, frozen=True, bits_accum=None if self.bits_accum >= FULL else self.bits_accum)

    def measure(self, model: nn.Module, inputs: Tensor | None, batches: Iterable[Tensor] | None) -> None:
        super().measure(model, inputs, batches)
        if self.model_activation_stats:
            self.input_statistics = read_input_statistics(Path(self.model_activation_stats))
        else:
            assert inputs is not None
            self.input_statistics = measure_input_statistics(model, [inputs] if batches is None else batches)
        bits_of = self.bits_of(model)
        self.clips = {name: (bits.clip_acts, bits.clip_n_stds) for name, bits in bits_of.items()}
        wanted = [name for name, bits in bits_of.items() if bits.activations and name in self.layout.run]
        if missing := [name for name in wanted if name not in self.input_statistics]:
            raise UserError(f"{self.model_activation_stats}: no statistics of the inputs of {', '.join(missing[:4])}")

    @torch.no_grad()
    def settle(self, model: nn.Module, inputs: Tensor | None) -> None:
        """Fix the ranges by the statistics."""
        chosen = self.clips
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLayer) and (bits := layer.settings.bits_inputs):
                rule, stds = chosen.get(name, (None, None))
                low, high = clip_range(rule or self.clip_acts, self.input_statistics[name], bits, stds or self.clip_n_stds)
                layer.input_low.fill_(low)
                layer.input_high.fill_(high)
                layer.input_seen.fill_(1)
