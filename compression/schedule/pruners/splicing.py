"""Dynamic network surgery (arXiv:1608.04493, equation 3): weights that were pruned may come back.

a = (mean|w| + s std|w|) low,  b = (mean|w| + s std|w|) high
mask = 0 if |w| < a;  the old mask if a <= |w| < b;  1 otherwise

Mean and deviation are those of the first asking. Only weights of which a second copy is kept (``use_double_copies``) go
on learning while they are masked, so only those come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.schedule.pruners.measured import once, spread
from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from utils.errors import UserError
from utils.options import by_parameter, number, option


@dataclass
class SplicingPruner(Pruner):
    """Prunes below one threshold, splices in above a higher one.

    Attributes:
        sensitivities: s by parameter; '*' is the default of the other weights.
        low_thresh_mult: low, of the threshold below which elements go.
        hi_thresh_mult: high, of the threshold from which on they come back.
        sensitivity_multiplier: above 0, s is s * ((epoch - first epoch) * sensitivity_multiplier + 1).
    """

    sensitivities: Mapping[str, float] = option(by_parameter(number(least=0)))
    low_thresh_mult: float = option(number(least=0))
    hi_thresh_mult: float = option(number(least=0))
    sensitivity_multiplier: float = option(number(least=0), 0.0)
    _means: dict[str, Tensor] = field(default_factory=dict, init=False)
    _deviations: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.hi_thresh_mult < self.low_thresh_mult:
            raise UserError(f"hi_thresh_mult {self.hi_thresh_mult:g} is below low_thresh_mult {self.low_thresh_mult:g}")

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.sensitivities)

    def decide(self, task: PruningTask) -> Decision:
        growth = (task.moment.epoch - task.moment.first) * self.sensitivity_multiplier + 1
        masks = {}
        for name, sensitivity in self.sensitivities.items():
            weight = task.weights[name]
            size = weight.abs()
            mean = once(self._means, name, size, lambda _, values: values.mean())
            threshold = mean + sensitivity * growth * once(self._deviations, name, size, spread)
            old = task.masks.get(name, torch.ones_like(weight))
            above = torch.where(size < threshold * self.hi_thresh_mult, old, torch.ones_like(weight))
            masks[name] = torch.where(size < threshold * self.low_thresh_mult, torch.zeros_like(weight), above)
        return Decision(masks)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means), "deviations": dict(self._deviations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means, self._deviations = dict(state["means"]), dict(state["deviations"])
