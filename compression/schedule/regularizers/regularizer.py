"""The interface of a regularizer: a term added to the loss, and optionally a threshold below which weights are pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.options import choice, option


@dataclass(kw_only=True)
class Regularizer(ABC):
    """Base of all regularizers: a dataclass whose fields are its arguments in a schedule (see ``utils.options``).

    Attributes:
        reg_regims: by parameter, lambda and whatever else the regularizer needs.
        threshold_criteria: whether the largest or the mean absolute weight of a structure is compared with lambda; what is
            not above lambda is pruned. None: nothing is pruned.
    """

    reg_regims: Mapping[str, Any]
    threshold_criteria: str | None = option(choice(None, "Max", "Mean_Abs"), None)

    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters that are regularized."""
        return tuple(self.reg_regims)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the term, a scalar on the tape; ``weights`` are all parameters by name."""
        return torch.stack([term for name in self.reg_regims for term in self.terms(name, weights[name])]).sum()

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks by name: 1 above the threshold, 0 elsewhere; empty without a threshold."""
        return {name: self.mask(name, weights[name]) for name in self.reg_regims} if self.threshold_criteria else {}

    @abstractmethod
    def terms(self, name: str, weight: Tensor) -> list[Tensor]:
        """Return the scalars that a parameter adds to the loss."""

    @abstractmethod
    def mask(self, name: str, weight: Tensor) -> Tensor:
        """Return the mask of a parameter under the threshold."""
