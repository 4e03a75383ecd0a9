"""Element-wise pruning by the spread of the weights (arXiv:1506.02626): keep |w| > s * std(w)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compression.schedule.pruners.measured import once, spread
from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from utils.options import by_parameter, number, option


@dataclass
class SensitivityPruner(Pruner):
    """Keeps the elements whose magnitude is above a multiple of the standard deviation.

    The deviation is that of the weights at the first asking, before anything is pruned: those that stay spread more.

    Attributes:
        sensitivities: s by parameter; '*' is the default of the other weights.
    """

    sensitivities: Mapping[str, float] = option(by_parameter(number(least=0)))
    _deviations: dict[str, Tensor] = field(default_factory=dict, init=False)

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.sensitivities)

    def decide(self, task: PruningTask) -> Decision:
        masks = {}
        for name, sensitivity in self.sensitivities.items():
            weight = task.weights[name]
            threshold = sensitivity * once(self._deviations, name, weight, spread)
            masks[name] = (weight.abs() > threshold).to(weight.dtype)
        return Decision(masks)

    def state_dict(self) -> dict[str, Any]:
        return {"deviations": dict(self._deviations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._deviations = dict(state["deviations"])
