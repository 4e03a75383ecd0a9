"""How a module is quantized, as plain data that a checkpoint's specification holds."""

from __future__ import annotations

from dataclasses import dataclass

from models.quantized.numbers import IMAGES, MODES
from utils.errors import UserError
from utils.options import boolean, choice, integer, number, option, optional, text

MAX_BITS = 16
METHODS = ("linear", *IMAGES)
bit_width = optional(integer(1, MAX_BITS))


@dataclass(frozen=True)
class LayerSettings:
    """A convolution or linear layer.

    Attributes:
        method: how weights and bias are quantized.
        bits_weights, bits_bias, bits_inputs: None leaves them in float.
        mode, input_mode: the grids of the weights (method "linear") and of the input.
        per_channel: one grid per output channel.
        norm: name of the batch norm after the layer; the weights' grid is that of the folded weights.
        decay: of the moving average of the input's range.
        frozen: whether the input's range is given, not tracked.
        bits_accum: of the accumulator, at whose limits the sums of products saturate.
        float_copy: train ``float_weight`` and keep its image in ``weight``; otherwise ``weight`` itself is rounded.
    """

    method: str = option(choice(*METHODS), "linear")
    bits_weights: int | None = option(bit_width, None)
    bits_bias: int | None = option(bit_width, None)
    mode: str = option(choice(*MODES), "sym_restr")
    per_channel: bool = option(boolean, False)
    norm: str | None = option(optional(text), None)
    bits_inputs: int | None = option(bit_width, None)
    input_mode: str = option(choice(*MODES), "asym_u")
    decay: float = option(number(least=0, below=1), 0.999)
    frozen: bool = option(boolean, False)
    bits_accum: int | None = option(optional(integer(2, 31)), None)
    float_copy: bool = option(boolean, True)

    def __post_init__(self) -> None:
        if self.method == "dorefa" and not self.float_copy:
            raise UserError("DoReFa changes weights whenever it quantizes them, so it needs a float copy: train_with_fp_copy must be true")
        for name in ("bits_weights", "bits_bias", "bits_inputs"):
            if getattr(self, name) == 1 and (self.method != "dorefa" or name == "bits_inputs"):
                raise UserError(f"{name} is 1; only DoReFa quantizes to 1 bit, and only weights")


@dataclass(frozen=True)
class ClippedSettings:
    """A ReLU that is clipped to [0, 1] and rounded to 2^bits levels (arXiv:1606.06160, arXiv:1709.01134)."""

    bits: int = option(integer(1, MAX_BITS))


@dataclass(frozen=True)
class PactSettings:
    """A ReLU that is clipped at a learned value, ``initial`` at first (arXiv:1805.06085)."""

    bits: int = option(integer(1, MAX_BITS))
    initial: float = option(number(above=0), 8.0)
