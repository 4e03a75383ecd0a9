"""Quantizers: they turn a network into one of few bits. One method per file; a new one is a line in ``QUANTIZERS``."""

from __future__ import annotations

from compression.quantizers.dorefa import DorefaQuantizer
from compression.quantizers.pact import PACTQuantizer
from compression.quantizers.post_training import PostTrainLinearQuantizer
from compression.quantizers.quantizer import Quantizer
from compression.quantizers.range_linear import QuantAwareTrainRangeLinearQuantizer
from compression.quantizers.wrpn import WRPNQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "DorefaQuantizer": DorefaQuantizer,
    "WRPNQuantizer": WRPNQuantizer,
    "PACTQuantizer": PACTQuantizer,
    "QuantAwareTrainRangeLinearQuantizer": QuantAwareTrainRangeLinearQuantizer,
    "PostTrainLinearQuantizer": PostTrainLinearQuantizer,
}

__all__ = ["QUANTIZERS", "Quantizer"]
