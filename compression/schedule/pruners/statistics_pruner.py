"""Base of the pruners whose thresholds follow statistics of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import Pruner
from utils.errors import UserError
from utils.options import by_parameter, number, option


@dataclass
class StatisticsPruner(Pruner):
    """Takes each statistic of a parameter once, at the first decision, and keeps it.

    Attributes:
        sensitivities: s by parameter; '*' is the default of the other weights.
    """

    sensitivities: Mapping[str, float] = option(by_parameter(number(least=0)))
    _deviations: dict[str, Tensor] = field(default_factory=dict, init=False)

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.sensitivities)

    def deviation(self, name: str, values: Tensor) -> Tensor:
        """Return the unbiased standard deviation of a parameter's values, a scalar, as it was at the first decision.

        Raises:
            UserError: there is only one value.
        """
        if name not in self._deviations:
            if values.numel() < 2:
                raise UserError(f"{name} has one element, so it has no standard deviation; name it in no sensitivities")
            self._deviations[name] = torch.std(values)
        return self._deviations[name].to(values.device)

    def state_dict(self) -> dict[str, Any]:
        return {"deviations": dict(self._deviations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._deviations = dict(state["deviations"])
