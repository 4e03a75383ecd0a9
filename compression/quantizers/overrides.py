"""Bits by module: the quantizer's own, overridden for modules whose names match a pattern."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compression.quantizers.clipping import CLIPS
from models.quantized.settings import MAX_BITS
from utils.errors import UserError, nearest
from utils.options import Place, Reader, choice, integer, mapping, number, plain, shown

Overrides = dict[str, dict[str, Any]]  # pattern -> changes, in order
FLOAT_BITS = 32  # what files write for "not quantized"


@dataclass(frozen=True)
class Bits:
    """Bits of a module's activations, weights and bias; None means not quantized.

    Attributes:
        clip_acts, clip_n_stds: how the range of its input is clipped after training, if not as the quantizer says.
    """

    activations: int | None = None
    weights: int | None = None
    bias: int | None = None
    clip_acts: str | None = None
    clip_n_stds: float | None = None


KEYS = {f"bits_{name}": name for name in ("activations", "weights", "bias")}
CLIP_KEYS = {name: name for name in ("clip_acts", "clip_n_stds")}
OLD_KEYS = {"acts": "bits_activations", "wts": "bits_weights"}  # of Distiller's bits_overrides
INPUTS, FROM_OUTPUT = "input_overrides", "from_output"
NOT_DONE = {
    "quantize_inputs": "is not done: the inputs of convolutions and linear layers are quantized here, and the outputs of no layer; give"
    " bits_activations to the layer that reads them"
}


def read_bits(value: Any, place: Place) -> int | None:
    """Take a number of bits; nothing or 32 for "not quantized"."""
    return None if value is None or (type(value) is int and value == FLOAT_BITS) else integer(1, MAX_BITS)(value, place)


def read_overrides(value: Any, place: Place) -> Overrides:
    """Take a mapping from regular expressions of module names to bits, in the file's order."""
    return _read(value, place, dict.fromkeys(KEYS, read_bits))


def read_clipped_overrides(value: Any, place: Place) -> Overrides:
    """Take also how the range of a module's input is clipped.

    Distiller's ``input_overrides`` are those of the first input, which count before what stands beside them. Inputs always
    have settings of their own here, so ``from_output`` changes nothing.
    """
    readers = {**dict.fromkeys(KEYS, read_bits), "clip_acts": choice(*CLIPS), "clip_n_stds": number(above=0)}
    plain_value = {}
    for pattern, given in mapping(value if value is not None else {}, place).items():
        settings = dict(mapping(given, place / pattern))
        for index, inner in mapping(settings.pop(INPUTS, {}), place / pattern / INPUTS).items():
            if index != 0:
                raise (place / pattern / INPUTS).error(f"has an input {shown(index)}; the layers that are quantized have one, 0")
            settings |= {key: item for key, item in mapping(inner, place / pattern / INPUTS / 0).items() if key != FROM_OUTPUT}
        plain_value[pattern] = settings
    return _read(plain_value, place, readers)


def _read(value: Any, place: Place, readers: Mapping[str, Reader]) -> Overrides:
    found: Overrides = {}
    for pattern, given in mapping(value if value is not None else {}, place).items():
        inner = place / pattern
        _expression(pattern, inner)
        found[pattern] = {}
        for key, item in mapping(given, inner).items():
            key = OLD_KEYS.get(key, key)
            if key in NOT_DONE:
                raise inner.error(f"'{key}' {NOT_DONE[key]}")
            if key not in readers:
                raise inner.error(f"unknown key {shown(key)}.{nearest(str(key), readers)} Valid: {', '.join(readers)}")
            found[pattern][key] = readers[key](item, inner / key)
    return found


def _expression(pattern: Any, place: Place) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not 0 < len(pattern) <= 200:
        raise place.error(f"must be a regular expression of at most 200 characters, not {shown(pattern)}")
    if re.search(r"[+*}][^)]*\)[+*{]", pattern):
        raise place.error("repeats a repeat, which takes exponential time; write it without the outer one")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise place.error(f"is no regular expression: {error}") from None


def bits_by_name(
    default: Bits, given: Mapping[str, Mapping[str, Any]], names: Iterable[str], quantizable: Collection[str]
) -> dict[str, Bits]:
    """Return the bits of the modules that a pattern matches; the first pattern that matches the whole name wins.

    Args:
        default: the quantizer's own bits, for everything that the pattern does not change.
        given: pattern -> changes, in order.
        names: of the modules; ``module.`` in a name or a pattern is ignored.
        quantizable: the names of modules that can be quantized.

    Raises:
        UserError: a pattern matches no module, or gives bits to modules that can't be quantized.
    """
    names = list(names)
    found: dict[str, Bits] = {}
    for pattern, changes in given.items():
        expression = _expression(pattern, Place("overrides", {}, {}) / pattern)
        bare = _expression(pattern.replace("module.", ""), Place("overrides", {}, {}) / pattern) if "module." in pattern else expression
        matched = [name for name in names if any(e.fullmatch(n) for e in (expression, bare) for n in (name, plain(name)))]
        if not matched:
            raise UserError(f"overrides: '{pattern}' matches no module.{nearest(pattern, names)} The network has {len(names)}")
        if any(changes.get(key) for key in KEYS) and not any(name in quantizable for name in matched):
            raise UserError(
                f"overrides: '{pattern}' gives bits to {matched[0]}, which this quantizer does not replace."
                f"{nearest(pattern, quantizable)} It replaces {len(quantizable)} modules"
            )
        for name in matched:
            found.setdefault(name, replace(default, **{(KEYS | CLIP_KEYS)[key]: value for key, value in changes.items()}))
    return found
