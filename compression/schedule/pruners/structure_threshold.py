"""Prune small structures: max |w| <= t, or mean |w| <= t."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from compression.schedule.regimes import regimes, structure_mask
from compression.structures import STRUCTURES
from utils.errors import UserError
from utils.options import choice, number, option


@dataclass
class StructureParameterPruner(Pruner):
    """Keeps the structures whose magnitude is above a threshold; it may prune a whole weight.

    Attributes:
        reg_regims: [threshold, structure] by weight. "Rows" are dim 0 of a matrix, as in regularizers.
        threshold_criteria: whether the largest or the mean magnitude of a structure is compared.
    """

    reg_regims: Mapping[str, tuple[float, str]] = option(
        regimes(number(least=0), (name for name, structure in STRUCTURES.items() if not structure.by_shape))
    )
    threshold_criteria: str = option(choice("Max", "Mean_Abs"))

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.reg_regims)

    def decide(self, task: PruningTask) -> Decision:
        return Decision({name: self._mask(name, task.weights[name]) for name in self.reg_regims})

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        threshold, structure = self.reg_regims[name]
        try:
            return structure_mask(weight, STRUCTURES[structure], threshold, self.threshold_criteria)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
