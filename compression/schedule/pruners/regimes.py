"""The older form of arguments: ``reg_regims: {weight: [number, structure]}``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from utils.options import Place, Reader, by_parameter, choice, shown


def regimes(level: Reader, kinds: Iterable[str]) -> Reader:
    """Take a mapping from patterns of parameter names to [number, structure]."""
    kind = choice(*kinds)

    def read(value: Any, place: Place) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise place.error(f"must be [number, structure], not {shown(value)}")
        return level(value[0], place / 0), kind(value[1], place / 1)

    return by_parameter(read)
