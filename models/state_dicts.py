"""State dicts of any origin: which of our networks they belong to, and how they are loaded into one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from models.networks import ARCHITECTURES, build
from models.spelling import respelled
from utils.errors import UserError
from utils.options import plain
from utils.spec import ModelSpec

SHOWN = 4  # names per list in an error


def load_state_(model: nn.Module, state: Mapping[str, Tensor], fresh_head: bool = False) -> list[str]:
    """Load a state dict into a model, in place, and adapt what can be adapted safely.

    Wrappers in names (``module.``) are dropped. A classification head of another name is renamed; one with another number
    of classes keeps its initial weights, and so does every head with ``fresh_head``. A stem for 1 or 3 input channels is
    converted to the other (sum or mean over the channels). Integer buffers that the file lacks keep their values.

    Returns:
        A note on each adaptation.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; the model is unchanged.
    """
    target = model.state_dict()
    notes: list[str] = []
    state = rename_head({plain(name): value for name, value in state.items()}, target, notes)
    fresh = _fresh_head(state, target, fresh_head, notes)
    _convert_stem_(state, target, notes)
    optional = fresh | {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    problems = {
        "missing": [name for name in target if name not in state and name not in optional],
        "not of this network": [name for name in state if name not in target],
        "of another type": [name for name in target if name in state and not _fits_in_type(state[name], target[name])],
        "of another shape": [name for name in target if name in state and state[name].shape != target[name].shape and name not in fresh],
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {problem} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for problem, names in problems.items()
            if names
        ]
        fitting = [name for name in target if name in state and name not in problems["of another shape"] + problems["of another type"]]
        fit = f"{len(fitting)} fit ({', '.join(fitting[:SHOWN])}{', ...' if len(fitting) > SHOWN else ''})" if fitting else "none fits"
        raise UserError(f"the weights do not fit the network: of {len(target)} tensors, {fit}; {'; '.join(parts)}")
    model.load_state_dict({name: state[name] if name in state and name not in fresh else target[name] for name in target})
    return notes


def _fits_in_type(found: Tensor, wanted: Tensor) -> bool:
    """Whether values can be taken as they are: a cast of integers or complex numbers to weights would be a wrong network."""
    kind = found.is_floating_point() if wanted.is_floating_point() else not found.is_complex()
    return kind and found.layout == wanted.layout


def identify(state: Mapping[str, Tensor], path: Path) -> str:
    """Return the name of the one of our architectures that has a state dict's names and shapes, or is as much narrower.

    Raises:
        UserError: none has.
    """
    num_classes, channels = count_classes(state, path), count_channels(state)
    wider: dict[str, dict[str, torch.Size]] = {}
    for name in ARCHITECTURES:
        target = _tensors_of(name, num_classes, channels)
        found = rename_head(respelled(state, target)[0], target, [])
        if _float_shapes(target) == _float_shapes(found):
            return name
        if is_narrower(found, target) and (shapes := _float_shapes(target)) not in wider.values():
            wider[name] = shapes
    if len(wider) == 1:
        return next(iter(wider))
    if wider:
        raise UserError(f"{path} holds a network with fewer channels than one of ours: {', '.join(wider)}; say which with --model")
    raise UserError(f"{path} is a plain state dict whose shapes match none of our architectures; name its architecture with --model")


@cache
def _tensors_of(name: str, num_classes: int, channels: int) -> dict[str, Tensor]:
    """Return the tensors of one of our architectures, without memory."""
    with torch.device("meta"):
        return dict(build(ModelSpec(name, num_classes, channels=channels)).state_dict())


def is_narrower(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the target's floating-point tensors with fewer channels; the head may have any classes."""
    theirs, ours = _float_shapes(state), _float_shapes(target)
    head, stem = find_head(target), find_stem(target)
    if set(theirs) != set(ours) or any(len(theirs[name]) != len(shape) for name, shape in ours.items()):
        return False
    narrower = False
    for name, shape in ours.items():
        for dim, (one, other) in enumerate(zip(theirs[name], shape, strict=True)):
            if (dim == 0 and name in (f"{head}.weight", f"{head}.bias")) or (dim == 1 and name == stem):
                continue
            if one > other:
                return False
            narrower |= one < other
    return narrower


def count_classes(state: Mapping[str, Tensor], path: Path) -> int:
    """Return the outputs of a classifier's head.

    Raises:
        UserError: there is no linear layer.
    """
    head = find_head(state)
    if head is None:
        raise UserError(f"{path} has no linear layer at its end, so it is no classifier that can be loaded here")
    return int(state[f"{head}.weight"].shape[0])


def count_channels(state: Mapping[str, Tensor]) -> int:
    """Return the input channels, 1 or 3, of the first convolution that has so many; 3 if none has."""
    return next((int(value.shape[1]) for value in state.values() if value.ndim == 4 and value.shape[1] in (1, 3)), 3)


def find_head(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the classification head, which is the last matrix, without ``.weight``."""
    matrices = [name for name, value in state.items() if name.endswith(".weight") and value.ndim == 2]
    return matrices[-1].removesuffix(".weight") if matrices else None


def find_stem(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first convolution's weight."""
    return next((name for name, value in state.items() if value.ndim == 4), None)


def _float_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if value.is_floating_point()}


def rename_head(state: dict[str, Tensor], target: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return a state dict whose head has the name of the target's, if it is certain which one it is."""
    theirs, ours = find_head(state), find_head(target)
    if not theirs or not ours or theirs == ours or f"{theirs}.weight" in target or f"{ours}.weight" in state:
        return state
    if state[f"{theirs}.weight"].shape[1] > target[f"{ours}.weight"].shape[1]:  # fewer are those of a network that was cut
        return state
    notes.append(f"the head '{theirs}' of the weights is this network's '{ours}'")
    return {f"{ours}{name.removeprefix(theirs)}" if name.startswith(f"{theirs}.") else name: value for name, value in state.items()}


def _fresh_head(state: Mapping[str, Tensor], target: Mapping[str, Tensor], wanted: bool, notes: list[str]) -> set[str]:
    """Return the names of the head's tensors if it is not loaded: because that is wanted, or the number of classes differs."""
    head = find_head(target)
    if head is None:
        return set()
    theirs, ours = state.get(f"{head}.weight"), target[f"{head}.weight"]
    if theirs is not None and theirs.ndim == 2 and theirs.shape[0] != ours.shape[0] and theirs.shape[1] == ours.shape[1]:
        notes.append(f"the head '{head}' has {theirs.shape[0]} classes in the weights and {ours.shape[0]} here: it starts fresh")
    elif wanted:
        notes.append(f"the head '{head}' starts fresh")
    else:
        return set()
    return {name for name in (f"{head}.weight", f"{head}.bias") if name in target}


def _convert_stem_(state: dict[str, Tensor], target: Mapping[str, Tensor], notes: list[str]) -> None:
    stem = find_stem(target)
    if stem is None or stem not in state or state[stem].ndim != 4:
        return
    theirs, ours = state[stem], target[stem]
    if {theirs.shape[1], ours.shape[1]} == {1, 3} and theirs.shape[0] == ours.shape[0] and theirs.shape[2:] == ours.shape[2:]:
        # A grey image gives the summed weights what an RGB image of equal channels gives the three; the way back divides.
        state[stem] = theirs.sum(1, keepdim=True) if ours.shape[1] == 1 else theirs.expand(-1, 3, -1, -1) / 3
        notes.append(f"the stem '{stem}' was converted from {theirs.shape[1]} to {ours.shape[1]} input channels")
