"""Quantization-aware training on linear grids (arXiv:1712.05877).

Weights are rounded on the grid of their own range, inputs of layers on that of a moving average of their range;
gradients pass straight through. Batch norm is folded: the grid is that of w * gamma / sqrt(var + eps).

Differs: batch norm is folded with its running statistics, in training too (arXiv:1806.08342, section 3.2.2, from the
start), and the norm itself stays where it is: the layer computes with Q(w s) / s. So in eval mode the network is exactly the
folded one, while training sees the batch's statistics as ever. What is rounded is the input of each layer, not the
output: a sum of a shortcut is rounded where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from compression.quantizers.layout import layout_of
from compression.quantizers.modes import DEFAULT_MODES, Modes, modes_of, read_modes
from compression.quantizers.overrides import Bits, read_bits
from compression.quantizers.quantizer import Quantizer
from models.quantized.layers import QuantizedLayer
from models.quantized.settings import LayerSettings
from utils.errors import UserError
from utils.modes import observed
from utils.options import boolean, number, option


@dataclass
class QuantAwareTrainRangeLinearQuantizer(Quantizer):
    """Trains with fake quantization of weights and of the layers' inputs.

    Attributes:
        mode: grid of inputs and weights: one of sym, sym_restr, asym_s, asym_u, or {activations: ..., weights: ...}. The
            default is what integer runtimes compute fastest.
        ema_decay: of the moving average of an input's least and greatest value; eval mode uses the average.
        per_channel_wts: a grid for each output channel.
        quantize_inputs: whether the network's own input is rounded.
    """

    bits_activations: int | None = option(read_bits, 8)
    bits_weights: int | None = option(read_bits, 8)
    mode: str | Modes = option(read_modes, DEFAULT_MODES)
    ema_decay: float = option(number(least=0, below=1), 0.999)
    per_channel_wts: bool = option(boolean, False)
    quantize_inputs: bool = option(boolean, True)

    def settings(self, name: str, bits: Bits) -> LayerSettings:
        rounds_input = name in self.layout.run and (self.quantize_inputs or name not in self.layout.first)
        return LayerSettings(
            self.method,
            bits.weights,
            bits.bias,
            modes_of(self.mode).weights,
            self.per_channel_wts,
            norm=self.layout.norms.get(name),
            bits_inputs=bits.activations if rounds_input else None,
            input_mode=modes_of(self.mode).activations,
            decay=self.ema_decay,
            float_copy=self.train_with_fp_copy,
        )

    def measure(self, model: nn.Module, inputs: Tensor | None, batches: Iterable[Tensor] | None) -> None:
        if inputs is None:
            raise UserError(f"{type(self).__name__} needs a batch of inputs, to find the batch norms that it folds")
        self.layout = layout_of(model, inputs)

    def settle(self, model: nn.Module, inputs: Tensor | None) -> None:
        """Begin the ranges with those of one batch."""
        assert inputs is not None
        layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module.settings.bits_inputs]
        handles = [layer.register_forward_pre_hook(_track) for layer in layers]
        with observed(model, handles):
            model(inputs)


def _track(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    assert isinstance(module, QuantizedLayer)
    module.track_(arguments[0])
