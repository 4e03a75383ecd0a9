"""The grids of a quantizer: one for everything, or one for activations and one for weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.quantized.numbers import MODES
from utils.errors import unknown
from utils.options import Place, build, choice, option

OLD_NAMES = {
    "SYMMETRIC": "sym",
    "SYMMETRIC_RESTRICTED": "sym_restr",
    "ASYMMETRIC_SIGNED": "asym_s",
    "ASYMMETRIC_UNSIGNED": "asym_u",
}


def read_mode(value: Any, place: Place) -> str:
    """Take the name of a grid; the names in old files too."""
    return str(choice(*MODES)(OLD_NAMES.get(value, value) if isinstance(value, str) else value, place))


@dataclass(frozen=True)
class Modes:
    """The grids of activations and of weights; see ``models.quantized.numbers.grid_of``."""

    activations: str = option(read_mode)
    weights: str = option(read_mode)


DEFAULT_MODES = Modes("asym_u", "sym_restr")


def read_modes(value: Any, place: Place) -> Modes:
    """Take one name, or a mapping {activations, weights}."""
    if isinstance(value, dict):
        return build(Modes, value, place)
    mode = read_mode(value, place)
    return Modes(mode, mode)


def modes_of(value: str | Modes) -> Modes:
    """Return the grids of a quantizer; made in Python, it may have one name for both.

    Raises:
        UserError: there is no such mode.
    """
    modes = value if isinstance(value, Modes) else Modes(value, value)
    for mode in (modes.activations, modes.weights):
        if mode not in MODES:
            raise unknown("mode", str(mode), MODES)
    return modes
