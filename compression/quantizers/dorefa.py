"""DoReFa-Net (arXiv:1606.06160).

Weights: w_q = 2 Q_k(tanh w / (2 max|tanh w|) + 1/2) - 1 over each layer (equation 9). A ReLU becomes clip to [0, 1],
then Q_k (equation 11). Q_k(x) = round((2^k - 1) x) / (2^k - 1), with the gradient of the identity.

Differs: zero weights, such as pruned ones, remain zero. Gradients are not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from compression.quantizers.relu import ReLUQuantizer


@dataclass
class DorefaQuantizer(ReLUQuantizer):
    """Quantizes weights by DoReFa and clips ReLUs to [0, 1]; exclude the first and the last layer by overrides."""

    method = "dorefa"
