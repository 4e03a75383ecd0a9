"""Quantization-aware training on linear grids (arXiv:1712.05877).

Weights are rounded to the grid of their own range, the inputs of layers to that of a moving average of their range;
gradients pass straight through. Batch norm is folded: the grid is that of w * gamma / sqrt(var + eps).

Differs: batch norm is folded with its running statistics, in training too (arXiv:1806.08342, section 3.2.2, from the
start), and the norm itself remains in place: the layer computes with Q(w s) / s. So in eval mode the network equals the
folded one, while training uses the batch's statistics as usual. The input of each layer is rounded, not its output: the sum
of a shortcut is rounded where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from compression.quantizers.linear_grid import LinearGridQuantizer
from compression.quantizers.overrides import Bits, read_bits
from models.quantized.layers import QuantizedLayer
from models.quantized.settings import LayerSettings
from utils.modes import observed
from utils.options import boolean, number, option


@dataclass
class QuantAwareTrainRangeLinearQuantizer(LinearGridQuantizer):
    """Trains with fake quantization of weights and layer inputs.

    Attributes:
        ema_decay: of the moving average of an input's minimum and maximum; eval mode uses the average.
        quantize_inputs: whether the network's own input is rounded.
    """

    bits_weights: int | None = option(read_bits, 8)
    ema_decay: float = option(number(least=0, below=1), 0.999)
    quantize_inputs: bool = option(boolean, True)

    def settings(self, name: str, bits: Bits) -> LayerSettings:
        float_input = {"bits_inputs": None} if name in self.layout.first and not self.quantize_inputs else {}
        return self.layer_settings(name, bits, decay=self.ema_decay, float_copy=self.train_with_fp_copy, **float_input)

    def settle(self, model: nn.Module, inputs: Tensor | None) -> None:
        """Initialise the ranges from one batch."""
        assert inputs is not None
        layers = [module for module in model.modules() if isinstance(module, QuantizedLayer) and module.settings.bits_inputs]
        handles = [layer.register_forward_pre_hook(_track) for layer in layers]
        with observed(model, handles):
            model(inputs)


def _track(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    assert isinstance(module, QuantizedLayer)
    module.track_(arguments[0])
