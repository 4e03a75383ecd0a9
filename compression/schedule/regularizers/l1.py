"""L1 norm; on the scale of batch normalisation it is Network Slimming (arXiv:1708.06519, equation 1).

loss = sum over the parameters of lambda * sum |w|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compression.schedule.regularizers.regularizer import Regularizer
from utils.options import by_parameter, number, option


@dataclass(kw_only=True)
class L1Regularizer(Regularizer):
    """Drives single weights to zero. Both threshold criteria prune the weights with |w| <= lambda.

    Attributes:
        reg_regims: lambda by parameter.
    """

    reg_regims: Mapping[str, float] = option(by_parameter(number(least=0)))

    def terms(self, name: str, weight: Tensor) -> list[Tensor]:
        return [self.reg_regims[name] * weight.abs().sum()]

    def mask(self, name: str, weight: Tensor) -> Tensor:
        return (weight.abs() > self.reg_regims[name]).to(weight.dtype)
