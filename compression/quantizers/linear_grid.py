"""Base of the quantizers with linear grids (arXiv:1712.05877): weights with batch norm folded in, and the inputs of layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compression.quantizers.layout import Layout, layout_of
from compression.quantizers.modes import DEFAULT_MODES, Modes, modes_of, read_modes
from compression.quantizers.overrides import Bits, read_bits
from compression.quantizers.quantizer import Quantizer
from models.quantized.settings import LayerSettings
from utils.errors import UserError
from utils.options import boolean, option


@dataclass
class LinearGridQuantizer(Quantizer):
    """Rounds weights and layer inputs to linear grids.

    Attributes:
        mode: grid of inputs and weights: one of sym, sym_restr, asym_s, asym_u, or {activations: ..., weights: ...}. The
            default is what integer runtimes compute fastest.
        per_channel_wts: a separate grid for each output channel.
    """

    bits_activations: int | None = option(read_bits, 8)
    mode: str | Modes = option(read_modes, DEFAULT_MODES)
    per_channel_wts: bool = option(boolean, False)

    layout: Layout = field(init=False, repr=False, compare=False, default_factory=Layout)

    def layer_settings(self, name: str, bits: Bits, **others: Any) -> LayerSettings:
        """Return the settings of a layer; its input is rounded if the layer runs at all."""
        modes, norm = modes_of(self.mode), self.layout.norms.get(name)
        inputs = {"bits_inputs": bits.activations if name in self.layout.run else None, "input_mode": modes.activations}
        chosen = {**inputs, **others}
        return LayerSettings(self.method, bits.weights, bits.bias, modes.weights, self.per_channel_wts, norm=norm, **chosen)

    def measure(self, model: nn.Module, inputs: Tensor | None, batches: Iterable[Tensor] | None) -> None:
        if inputs is None:
            raise UserError(f"{type(self).__name__} needs a batch of inputs, to find the batch norms that it folds")
        self.layout = layout_of(model, inputs)
