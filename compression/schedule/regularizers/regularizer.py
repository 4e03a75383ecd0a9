"""What a regularizer is: a term that is added to the loss, and perhaps a threshold below which weights go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from utils.options import choice, option


@dataclass(kw_only=True)
class Regularizer(ABC):
    """Base of all regularizers: a dataclass whose fields are its arguments in a schedule (see ``utils.options``).

    Attributes:
        threshold_criteria: what of a structure is compared with lambda: its largest or its mean absolute weight; what is
            not above goes. None: nothing goes.
    """

    threshold_criteria: str | None = option(choice(None, "Max", "Mean_Abs"), None)

    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters that it acts on."""

    @abstractmethod
    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the term, a scalar on the tape; ``weights`` are all parameters by name."""

    @property
    def thresholds(self) -> bool:
        """Whether ``masks`` finds anything too small."""
        return self.threshold_criteria is not None

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by name, what is above the threshold (1) and what is not (0); empty without a threshold."""
        return {}
