"""How many structures of a weight a ranked pruner prunes: a fixed fraction, or one that grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from compression.schedule.pruners.gradual import check_growth, gradual
from compression.schedule.pruners.pruner import Moment, PruningTask
from compression.schedule.pruners.ranked import KINDS, RankedPruner
from compression.schedule.regimes import regimes
from utils.errors import UserError
from utils.options import number, option, optional

SPARSITY = number(least=0, below=1)


@dataclass(kw_only=True)
class FixedSparsity(RankedPruner):
    """Prunes the same fraction at every decision.

    Attributes:
        desired_sparsity: fraction of the structures to prune.
        reg_regims: [sparsity, structure] by weight, instead of weights, group_type and desired_sparsity.
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
            if self.group_dependency and len(set(self._levels().values())) > 1:
                raise UserError(f"group_dependency {self.group_dependency}: all weights in reg_regims must have the same sparsity")
        super().__post_init__()

    def kind(self, name: str) -> str:
        return self.reg_regims[name][1] if self.reg_regims else self.group_type

    def level(self, name: str, task: PruningTask) -> float:
        return self._levels()[name]

    def target(self, moment: Moment) -> float | None:
        levels = set(self._levels().values())
        return levels.pop() if len(levels) == 1 else None

    def _levels(self) -> dict[str, float]:
        if self.reg_regims:
            return {name: level for name, (level, _) in self.reg_regims.items()}
        assert self.desired_sparsity is not None
        return dict.fromkeys(self.weights, self.desired_sparsity)


@dataclass(kw_only=True)
class GradualSparsity(RankedPruner):
    """Prunes more at every decision (arXiv:1710.01878, equation 1); the formula is in ``gradual``.

    Attributes:
        initial_sparsity: fraction of the structures to prune at the first decision.
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
