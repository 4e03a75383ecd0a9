"""WRPN: wide reduced-precision networks (arXiv:1709.01134, section 5).

Weights: clamped to [-1, 1], w_q = round((2^(k-1) - 1) w) / (2^(k-1) - 1). A ReLU becomes clip to [0, 1], then
round((2^k - 1) x) / (2^k - 1).

Differs: the network is not widened here; build a wider one.
"""

from __future__ import annotations

from dataclasses import dataclass

from compression.quantizers.relu import ReLUQuantizer


@dataclass
class WRPNQuantizer(ReLUQuantizer):
    """Quantizes weights to 2^(k-1) - 1 positive levels and clips ReLUs to [0, 1]."""

    method = "wrpn"
