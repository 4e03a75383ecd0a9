"""What the regularizers of structures share: how a file names a parameter's structures, and the threshold on them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compression.schedule.regularizers.regularizer import Regularizer
from compression.structures import COMBINATIONS, STRUCTURES, Structure
from utils.options import Place, Reader, by_parameter, choice, number, option, shown

GROUPS: dict[str, tuple[Structure, ...]] = {
    **{name: (structure,) for name, structure in STRUCTURES.items() if not structure.by_shape},
    **COMBINATIONS,
}


class Regime(NamedTuple):
    """How strongly the structures of a parameter are regularized: lambda, and a name of ``GROUPS``."""

    strength: float
    group: str

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The structures; a combined group has several."""
        return GROUPS[self.group]


def regimes(groups: Mapping[str, tuple[Structure, ...]] = GROUPS) -> Reader:
    """Take a mapping from patterns of parameter names to [lambda, group]; return one from names to ``Regime``."""

    def regime(value: Any, place: Place) -> Regime:
        if not isinstance(value, list) or len(value) != 2:
            raise place.error(f"must be [lambda, group], not {shown(value)}")
        return Regime(number(least=0)(value[0], place / 0), choice(*groups)(value[1], place / 1))

    def read(value: Any, place: Place) -> dict[str, Regime]:
        found: dict[str, Regime] = by_parameter(regime)(value, place)
        for name, chosen in found.items():
            for structure in chosen.structures:
                if not structure.dims[0] <= place.parameters[name] <= structure.dims[1]:
                    meaning = f"structure '{structure.name}' is {structure.meaning}"
                    raise place.error(f"{meaning}; {name} has {place.parameters[name]} dimension(s)")
        return found

    return read


@dataclass
class GroupRegularizer(Regularizer):
    """Base of the regularizers of structures. Under a threshold a weight of a combined group stays when all its structures do.

    Attributes:
        reg_regims: [lambda, group] by parameter.
    """

    reg_regims: Mapping[str, Regime] = option(regimes())

    def parameters(self) -> tuple[str, ...]:
        return tuple(self.reg_regims)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        terms = [
            regime.strength * self.term(name, structure.view(weights[name]))
            for name, regime in self.reg_regims.items()
            for structure in regime.structures
        ]
        return torch.stack(terms).sum()

    @abstractmethod
    def term(self, name: str, groups: Tensor) -> Tensor:
        """Return a parameter's term without lambda, a scalar; ``groups`` is [structures, elements of each]."""

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.threshold_criteria is None:
            return {}
        return {name: self._mask(weights[name], regime) for name, regime in self.reg_regims.items()}

    def _mask(self, weight: Tensor, regime: Regime) -> Tensor:
        stays = []
        for structure in regime.structures:
            sizes = structure.view(weight).abs()
            sizes = sizes.amax(1) if self.threshold_criteria == "Max" else sizes.mean(1)
            stays.append(structure.expand((sizes > regime.strength).to(weight.dtype), weight.shape))
        return math.prod(stays[1:], start=stays[0])
