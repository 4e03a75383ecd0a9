"""L1 norm; on the scale of batch normalisation it is Network Slimming (arXiv:1708.06519, equation 1).

loss = sum over the parameters of lambda * sum |w|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.regularizers.regularizer import Regularizer
from utils.options import by_parameter, choice, number, option


@dataclass
class L1Regularizer(Regularizer):
    """Drives single weights to zero.

    Attributes:
        reg_regims: lambda by parameter.
        threshold_criteria: where one is given, weights of |w| <= lambda go; of a single weight both are the same.
    """

    reg_regims: Mapping[str, float] = option(by_parameter(number(least=0)))
    threshold_criteria: str | None = option(choice(None, "Max", "Mean_Abs"), None)

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.reg_regims)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([strength * weights[name].abs().sum() for name, strength in self.reg_regims.items()]).sum()

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.threshold_criteria is None:
            return {}
        return {name: (weights[name].abs() > strength).to(weights[name].dtype) for name, strength in self.reg_regims.items()}
