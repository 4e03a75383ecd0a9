"""L1 norm; on the scale of batch normalisation it is Network Slimming (arXiv:1708.06519, equation 1).

loss = sum over the parameters of lambda * sum |w|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.schedule.regularizers.regularizer import Regularizer
from utils.options import by_parameter, number, option


@dataclass
class L1Regularizer(Regularizer):
    """Drives single weights to zero.

    Of a single weight both threshold criteria are the same: weights of |w| <= lambda go.

    Attributes:
        reg_regims: lambda by parameter.
    """

    reg_regims: Mapping[str, float] = option(by_parameter(number(least=0)))

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.reg_regims)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([strength * weights[name].abs().sum() for name, strength in self.reg_regims.items()]).sum()

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.threshold_criteria is None:
            return {}
        return {name: (weights[name].abs() > strength).to(weights[name].dtype) for name, strength in self.reg_regims.items()}
