"""``reg_regims: {parameter: [number, structure]}``: a number and a structure for each parameter, as in Distiller's files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from compression.structures import Structure
from utils.options import Place, Reader, by_parameter, choice, shown


def regimes(number: Reader, structures: Iterable[str], form: str = "[number, structure]") -> Reader:
    """Take a mapping from patterns of parameter names to [number, structure]; return (number, structure) by name."""
    structure = choice(*structures)

    def read(value: Any, place: Place) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise place.error(f"must be {form}, not {shown(value)}")
        return number(value[0], place / 0), structure(value[1], place / 1)

    return by_parameter(read)


def structure_mask(weight: Tensor, structure: Structure, threshold: float, criterion: str) -> Tensor:
    """Return a mask that keeps the structures of a weight whose max |w| ("Max") or mean |w| ("Mean_Abs") is above a threshold."""
    magnitudes = structure.view(weight.abs())
    sizes = magnitudes.amax(1) if criterion == "Max" else magnitudes.mean(1)
    return structure.expand((sizes > threshold).to(weight.dtype), weight.shape)
