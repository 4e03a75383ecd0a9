"""What a regularizer is: a term that is added to the loss, and perhaps a threshold below which weights go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Regularizer:
    """Base of all regularizers: a dataclass whose fields are its arguments in a schedule (see ``utils.options``)."""

    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters that it acts on."""
        raise NotImplementedError

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the term, a scalar on the tape; ``weights`` are all parameters by name."""
        raise NotImplementedError

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by name, what is above the threshold (1) and what is not (0); empty without a threshold."""
        return {}
