"""Base of the regularizers of structures: how a file names a parameter's structures, and their threshold."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compression.schedule.regimes import regimes, structure_mask
from compression.schedule.regularizers.regularizer import Regularizer
from compression.structures import COMBINATIONS, STRUCTURES, Structure
from utils.options import Place, Reader, number, option

GROUPS: dict[str, tuple[Structure, ...]] = {
    **{name: (structure,) for name, structure in STRUCTURES.items() if not structure.by_shape},
    **COMBINATIONS,
}


def fitting_regimes(groups: Mapping[str, tuple[Structure, ...]] = GROUPS) -> Reader:
    """Take a mapping from patterns of parameter names to [lambda, group] whose structures the parameters have."""
    read_regimes = regimes(number(least=0), groups, "[lambda, group]")

    def read(value: Any, place: Place) -> dict[str, tuple[float, str]]:
        found: dict[str, tuple[float, str]] = read_regimes(value, place)
        for name, (_, group) in found.items():
            for structure in groups[group]:
                if not structure.dims[0] <= place.parameters[name] <= structure.dims[1]:
                    meaning = f"structure '{structure.name}' is {structure.meaning}"
                    raise place.error(f"{meaning}; {name} has {place.parameters[name]} dimension(s)")
        return found

    return read


@dataclass(kw_only=True)
class GroupRegularizer(Regularizer):
    """Base of the regularizers of structures. A weight in a combined group is kept if all its structures are above the threshold.

    Attributes:
        reg_regims: (lambda, name in ``GROUPS``) by parameter.
    """

    reg_regims: Mapping[str, tuple[float, str]] = option(fitting_regimes())

    def terms(self, name: str, weight: Tensor) -> list[Tensor]:
        strength, group = self.reg_regims[name]
        return [strength * self.term(name, structure.view(weight)) for structure in GROUPS[group]]

    def distance(self, weights: Mapping[str, Tensor]) -> str:
        """Say how far the structures are from zero: how many are, and how near the next one is."""
        zeros, count, nearest = 0, 0, (math.inf, "")
        for name, (_, group) in self.reg_regims.items():
            for structure in GROUPS[group]:
                norms = structure.view(weights[name].detach()).double().norm(dim=1)
                above = norms[norms > 0]
                zeros, count = zeros + len(norms) - len(above), count + len(norms)
                if len(above):
                    nearest = min(nearest, (float(above.min() / norms.mean()), name))
        near = f"; the weakest of the others, in {nearest[1]}, has {nearest[0]:.2g} of the mean norm there" if nearest[1] else ""
        return f"{zeros:,} of {count:,} structures are zero{near}"

    @abstractmethod
    def term(self, name: str, groups: Tensor) -> Tensor:
        """Return a parameter's term without lambda, a scalar; ``groups`` is [structures, elements of each]."""

    def mask(self, name: str, weight: Tensor) -> Tensor:
        strength, group = self.reg_regims[name]
        assert self.threshold_criteria is not None
        first, *others = (structure_mask(weight, structure, strength, self.threshold_criteria) for structure in GROUPS[group])
        return math.prod(others, start=first)
