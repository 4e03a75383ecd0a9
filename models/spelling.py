"""Names of a state dict that others have given, brought to those of one of our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

DIGITS = re.compile(r"\d+")


def respelled(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict with the target's names, as far as that is certain, and a note on each change.

    A prefix that wrappers put before all of a network's names (``model.``, ``net.``) is dropped, with what does not have it.
    Modules that are counted otherwise (``conv3`` for the third convolution because a pool is counted too) are renumbered, if
    the tensors in their order have the same names but for the numbers, and as many dimensions.
    """
    notes: list[str] = []
    found = dict(state)
    if prefix := _prefix(found, target) or _prefix_of_all(found, target):
        outside = [name for name in found if not name.startswith(prefix)]
        left_out = f"; left out: {', '.join(outside[:4])}" if outside else ""
        notes.append(f"the names of the weights begin with '{prefix}', which is dropped{left_out}")
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if renamed := _renumbered(found, target):
        notes.append("the layers of the weights are numbered otherwise; they are taken in their order")
        found = {renamed.get(name, name): value for name, value in found.items()}
    return found, notes


def _prefix(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """Return the prefix behind which all of the target's floating-point tensors are; "" if they are there without one."""
    wanted = _floats(target)
    if not wanted or all(name in state for name in wanted):
        return ""
    prefixes = {name[: len(name) - len(wanted[0])] for name in state if name.endswith(f".{wanted[0]}")}
    return next((prefix for prefix in sorted(prefixes, key=len) if all(prefix + name in state for name in wanted)), "")


def _prefix_of_all(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """Return what all names begin with, if without it they are the target's but for the numbers; else ""."""
    first = next(iter(state), "").split(".")
    for count in range(1, len(first)):
        prefix = ".".join(first[:count]) + "."
        if not all(name.startswith(prefix) for name in state):
            break
        if _renumbered({name.removeprefix(prefix): value for name, value in state.items()}, target):
            return prefix
    return ""


def _renumbered(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Return theirs -> ours for the names that differ in numbers alone; empty if the order does not tell."""
    theirs, ours = _floats(state), _floats(target)
    same = len(theirs) == len(ours) and set(theirs) != set(ours)
    pairs = list(zip(theirs, ours, strict=True)) if same else []
    for one, other in pairs:
        if DIGITS.sub("#", one) != DIGITS.sub("#", other) or state[one].ndim != target[other].ndim:
            return {}
    renamed = dict(pairs)
    modules = {one.rpartition(".")[0]: other.rpartition(".")[0] for one, other in pairs}
    for name in state:
        module, _, leaf = name.rpartition(".")
        if name not in renamed and module in modules:
            renamed[name] = f"{modules[module]}.{leaf}"
    return renamed


def _floats(state: Mapping[str, Tensor]) -> Sequence[str]:
    return [name for name, value in state.items() if value.is_floating_point()]
