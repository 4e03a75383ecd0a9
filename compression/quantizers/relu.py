"""Base of the quantizers that clip ReLUs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from compression.quantizers.overrides import Bits
from compression.quantizers.quantizer import Quantizer
from models.quantized.preparing import RELUS, replacement
from models.quantized.settings import ClippedSettings
from utils.errors import UserError


@dataclass
class ReLUQuantizer(Quantizer):
    """Replaces every ReLU by one that is clipped and rounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.replace_factory |= dict.fromkeys(RELUS, self.activation)

    def activation(self, module: nn.Module, name: str, bits: Bits) -> nn.Module | None:
        """Return the replacement of a ReLU; None leaves it as it is."""
        return replacement(module, "clipped_relu", ClippedSettings(bits.activations)) if bits.activations else None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.bits_activations and not any(type(module) in RELUS for module in model.modules()):
            raise UserError(
                f"{type(self).__name__} quantizes the outputs of ReLU, and the network has none: "
                "give bits_activations: null, or use QuantAwareTrainRangeLinearQuantizer"
            )
