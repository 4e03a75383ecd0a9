"""How many structures of a weight go: at once, or more and more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from compression.schedule.pruners.gradual import check_growth, gradual
from compression.schedule.pruners.pruner import Moment, PruningTask
from compression.schedule.pruners.ranked import KINDS, RankedPruner
from compression.schedule.pruners.regimes import regimes
from utils.errors import UserError
from utils.options import number, option, optional

SPARSITY = number(least=0, below=1)


@dataclass(kw_only=True)
class AtOnce(RankedPruner):
    """Prunes the same fraction at every asking.

    Attributes:
        desired_sparsity: fraction of the structures that goes.
        reg_regims: [sparsity, structure] by weight, in place of weights, group_type and desired_sparsity.
    """

    desired_sparsity: float | None = option(optional(SPARSITY), None)
    reg_regims: Mapping[str, tuple[float, str]] | None = option(optional(regimes(SPARSITY, KINDS)), None)

    def __post_init__(self) -> None:
        if self.reg_regims is None:
            if self.desired_sparsity is None:
                raise UserError("'desired_sparsity' is missing")
        elif self.weights or self.group_type or self.desired_sparsity is not None:
            raise UserError("give either 'reg_regims' or 'weights', 'group_type' and 'desired_sparsity'")
        else:
            self.weights = tuple(self.reg_regims)
            if self.group_dependency and len({level for level, _ in self.reg_regims.values()}) > 1:
                raise UserError(f"group_dependency {self.group_dependency}: all weights in reg_regims must have the same sparsity")
        super().__post_init__()

    def kind(self, name: str) -> str:
        return self.reg_regims[name][1] if self.reg_regims else self.group_type

    def level(self, name: str, task: PruningTask) -> float:
        return self._level(name)

    def target(self, moment: Moment) -> float | None:
        levels = {self._level(name) for name in self.weights}
        return levels.pop() if len(levels) == 1 else None

    def _level(self, name: str) -> float:
        level = self.reg_regims[name][0] if self.reg_regims else self.desired_sparsity
        assert level is not None
        return level


@dataclass(kw_only=True)
class Gradual(RankedPruner):
    """Prunes more at every asking (arXiv:1710.01878, equation 1): see ``gradual`` for the formula.

    Attributes:
        initial_sparsity: fraction of the structures that goes at the first asking.
        final_sparsity: at the last one.
    """

    initial_sparsity: float = option(SPARSITY)
    final_sparsity: float = option(SPARSITY)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_growth(self.initial_sparsity, self.final_sparsity)

    def level(self, name: str, task: PruningTask) -> Fraction:
        return gradual(self.initial_sparsity, self.final_sparsity, task.moment)

    def target(self, moment: Moment) -> float | None:
        return float(gradual(self.initial_sparsity, self.final_sparsity, moment))
