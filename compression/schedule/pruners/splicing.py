"""Dynamic network surgery (arXiv:1608.04493, equation 3): pruned weights may come back.

a = (mean|w| + s std|w|) low,  b = (mean|w| + s std|w|) high
mask = 0 if |w| < a;  the old mask if a <= |w| < b;  1 otherwise

Mean and deviation are those of the first decision. Masked weights keep training only if a second copy of them is kept
(``use_double_copies``), so only those come back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compression.schedule.pruners.pruner import Decision, PruningTask
from compression.schedule.pruners.statistics_pruner import StatisticsPruner
from utils.errors import UserError
from utils.options import number, option


@dataclass
class SplicingPruner(StatisticsPruner):
    """Prunes elements below one threshold and restores those that reach a higher one.

    Attributes:
        low_thresh_mult: low, for the threshold below which elements are pruned.
        hi_thresh_mult: high, for the threshold from which on they come back.
        sensitivity_multiplier: above 0, s becomes s * ((epoch - first epoch) * sensitivity_multiplier + 1).
    """

    low_thresh_mult: float = option(number(least=0))
    hi_thresh_mult: float = option(number(least=0))
    sensitivity_multiplier: float = option(number(least=0), 0.0)
    _means: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.hi_thresh_mult < self.low_thresh_mult:
            raise UserError(f"hi_thresh_mult {self.hi_thresh_mult:g} is below low_thresh_mult {self.low_thresh_mult:g}")

    def decide(self, task: PruningTask) -> Decision:
        growth = (task.moment.epoch - task.moment.first) * self.sensitivity_multiplier + 1
        masks = {}
        for name, sensitivity in self.sensitivities.items():
            weight = task.weights[name]
            size = weight.abs()
            mean = self._means.setdefault(name, size.mean()).to(size.device)
            threshold = mean + sensitivity * growth * self.deviation(name, size)
            ones = torch.ones_like(weight)
            above = torch.where(size < threshold * self.hi_thresh_mult, task.masks.get(name, ones), ones)
            masks[name] = torch.where(size < threshold * self.low_thresh_mult, torch.zeros_like(weight), above)
        return Decision(masks)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._means = dict(state["means"])
