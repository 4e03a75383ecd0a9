"""Weights of any origin into a model: ours, plain state dicts, official YOLOv5 files. What was mended is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.networks import ARCHITECTURES, build, resolve_model
from models.networks.widths import group_counts, resize_
from models.quantized.preparing import prepare_
from utils.errors import UserError
from utils.files import pickled_tensors
from utils.files.checkpoint import NeedsCode, check_version, find_state_dict, is_checkpoint, read_tensor_file
from utils.modes import eval_mode
from utils.spec import ModelSpec

WRAPPERS = ("module", "_orig_mod")  # what DataParallel, DDP and torch.compile put into names
SHOWN = 4  # names per list in an error


@dataclass
class Loaded:
    """A network with its weights, and what is known of it.

    Attributes:
        notes: what was mended on the way, for the user to read.
        checkpoint: the whole content of one of our own checkpoints, else empty.
        named: whether the class names come from the file (else they are placeholders).
    """

    model: nn.Module
    spec: ModelSpec
    notes: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    named: bool = True


@dataclass
class WeightsFile:
    """What stands in a weights file, before any network is built."""

    path: Path
    state: dict[str, Tensor]
    spec: ModelSpec | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    named: bool = True


def read_weights(path: str | Path) -> WeightsFile:
    """Read a weights file of any origin without running code from it.

    Raises:
        UserError: the file is absent, damaged, foreign, or needs code to load.
    """
    path = Path(path)
    try:
        content = read_tensor_file(path)
    except NeedsCode as refusal:
        return _read_yolov5(path, refusal)
    if is_checkpoint(content):
        content = check_version(content, path)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content["state_dict"].items()):
            raise UserError(f"{path} is damaged: its state dict holds something else than tensors by name")
        return WeightsFile(path, content["state_dict"], ModelSpec.from_dict(content["spec"]), content)
    return WeightsFile(path, {plain_name(name): value for name, value in find_state_dict(content, path).items()})


def load_classifier(weights: str | Path, model_name: str | None = None) -> Loaded:
    """Build the network that a weights file describes and load it, as it is.

    Args:
        weights: one of our checkpoints, a plain state dict, or an official YOLOv5 classifier.
        model_name: the architecture of a plain state dict; without it, our own architectures are compared by shapes.

    Raises:
        UserError: the file is not readable, or its architecture is not known.
    """
    file = read_weights(weights)
    if file.spec is not None:
        check_name(file, model_name)
        model = build_as(file.spec, file)
        notes = load_state_(model, file.state)
        return Loaded(model, file.spec, notes, file.checkpoint, file.named)
    name, definition = resolve_model(model_name) if model_name else (identify(file.state, file.path), None)
    spec = ModelSpec(name, _num_outputs(file.state, file.path), default_size(name), _num_inputs(file.state), definition=definition)
    model = build(spec)
    return Loaded(model, spec, load_state_(model, file.state), named=False)


def check_name(file: WeightsFile, model_name: str | None) -> None:
    """Refuse a file that says that it is another architecture than the one that was asked for."""
    if model_name and file.spec and resolve_model(model_name)[0] != file.spec.name:
        raise UserError(f"--model {model_name} does not go with {file.path}, which is a {file.spec.name}; leave --model out")


def build_as(spec: ModelSpec, file: WeightsFile) -> nn.Module:
    """Build a network with the widths of the weights that it will take, quantized where it was.

    Where channels were cut (the file has a pruning plan), the shapes in the file carry the widths. The head keeps the
    specification's classes and the stem its input channels.

    Raises:
        UserError: the file's shapes are not those of a network of this kind.
    """
    model = build(spec)
    plan = file.checkpoint.get("plan")
    if not isinstance(plan, dict | None):
        raise UserError(f"{file.path} is damaged: its pruning plan is no mapping but {type(plan).__name__}")
    if plan:
        _narrow_(model, spec, file)
    if spec.quantization:
        _quantize_(model, spec, file.path)
    return model


def _quantize_(model: nn.Module, spec: ModelSpec, path: Path) -> None:
    """Replace the modules that a specification says are quantized, in place."""
    if not isinstance(spec.quantization, dict):
        raise UserError(f"{path} is damaged: its quantization is no mapping but {type(spec.quantization).__name__}")
    try:
        prepare_(model, spec.quantization)
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from None


def _narrow_(model: nn.Module, spec: ModelSpec, file: WeightsFile) -> None:
    """Give a network the widths of a file's tensors, in place."""
    target = model.state_dict()
    state = {name: tensor for name, tensor in file.state.items() if name in target and tensor.ndim == target[name].ndim}
    head, stem = _head(target), next((name for name, value in target.items() if value.ndim == 4), None)
    kept = {f"{head}.weight": 0, f"{head}.bias": 0, **({stem: 1} if stem else {})}
    for name, dim in kept.items():
        if name in state and state[name].shape[dim] != target[name].shape[dim]:
            shape = list(state[name].shape)
            shape[dim] = target[name].shape[dim]
            state[name] = state[name].new_empty(shape, device="meta")
    _check_groups(spec, model, file.path)
    try:
        resize_(model, state, spec.groups)
        model.load_state_dict({name: value for name, value in state.items() if not value.is_floating_point()}, strict=False)
        _check_runs(model, spec)
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{file.path} is damaged: its tensors' shapes make no {spec.name} at {spec.imgsz} px ({reason})") from None


def _check_groups(spec: ModelSpec, model: nn.Module, path: Path) -> None:
    known = group_counts(model)
    counts = spec.groups if isinstance(spec.groups, dict) else {"": 0}
    for name, count in counts.items():
        if name not in known or type(count) is not int or count < 1:
            raise UserError(
                f"{path} is damaged: it gives {count!r} groups to '{name}'; a grouped layer's name and a number above 0 belong there"
            )


@torch.no_grad()
def _check_runs(model: nn.Module, spec: ModelSpec) -> None:
    """Run one image through a network in eval mode: widths that do not fit together raise here, and not later."""
    with eval_mode(model):
        model(torch.zeros(1, spec.channels, spec.imgsz, spec.imgsz))


def load_state_(model: nn.Module, state: Mapping[str, Tensor], fresh_head: bool = False) -> list[str]:
    """Load a state dict into a model, in place, mending what is safe to mend.

    Wrappers in names (``module.``) are dropped; a classification head of another name is renamed, one of another class
    count is left fresh; a stem for 1 or 3 channels is converted (sum or mean over the input channels); constant
    buffers that a file lacks keep their values. ``fresh_head`` leaves the head as it is in any case.

    Returns:
        A note for each thing mended.

    Raises:
        UserError: a tensor is missing, left over, or of another shape; the model is as it was.
    """
    target = model.state_dict()
    state = {plain_name(name): value for name, value in state.items()}
    notes: list[str] = []
    state = _rename_head(state, target, notes)
    fresh = _mend_shapes(state, target, notes)
    if fresh_head and not fresh and (head := _head(target)):
        fresh = {name for name in (f"{head}.weight", f"{head}.bias") if name in target}
        notes.append(f"the head '{head}' starts fresh")
    constants = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    missing = [name for name in target if name not in state and name not in constants | fresh]
    extra = [name for name in state if name not in target]
    wrong = [name for name in target if name in state and state[name].shape != target[name].shape and name not in fresh]
    if missing or extra or wrong:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for names, what in ((missing, "missing"), (extra, "not of this network"), (wrong, "of another shape"))
            if names
        ]
        raise UserError(f"the weights do not fit the network: of {len(target)} tensors, {'; '.join(parts)}")
    model.load_state_dict({name: state[name] if name in state and name not in fresh else target[name] for name in target})
    return notes


def identify(state: Mapping[str, Tensor], path: Path) -> str:
    """Find the one of our architectures that a plain state dict belongs to, by names and shapes.

    Raises:
        UserError: none fits.
    """
    num_classes, channels = _num_outputs(state, path), _num_inputs(state)
    for name in ARCHITECTURES:
        with torch.device("meta"):
            model = build(ModelSpec(name, num_classes, channels=channels))
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}
        renamed = _rename_head(dict(state), model.state_dict(), [])
        if shapes == {key: tuple(value.shape) for key, value in renamed.items() if value.is_floating_point()}:
            return name
    raise UserError(f"{path} is a plain state dict of no architecture that we know by its shapes; say which with --model")


def plain_name(name: str) -> str:
    """Return a tensor's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _head(state: Mapping[str, Tensor]) -> str | None:
    """Name of the last matrix, without ``.weight``: the classification head."""
    matrices = [name for name, value in state.items() if name.endswith(".weight") and value.ndim == 2]
    return matrices[-1].removesuffix(".weight") if matrices else None


def _rename_head(state: dict[str, Tensor], target: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    theirs, ours = _head(state), _head(target)
    if not theirs or not ours or theirs == ours or f"{theirs}.weight" in target or f"{ours}.weight" in state:
        return state
    if state[f"{theirs}.weight"].shape[1] != target[f"{ours}.weight"].shape[1]:
        return state
    notes.append(f"the head '{theirs}' of the weights is this network's '{ours}'")
    return {name.replace(f"{theirs}.", f"{ours}.", 1) if name.startswith(f"{theirs}.") else name: v for name, v in state.items()}


def _mend_shapes(state: dict[str, Tensor], target: Mapping[str, Tensor], notes: list[str]) -> set[str]:
    """Convert the stem for other input channels; return the head's names if it must stay fresh."""
    head = _head(target)
    fresh: set[str] = set()
    if head and f"{head}.weight" in state:
        theirs, ours = state[f"{head}.weight"], target[f"{head}.weight"]
        if theirs.ndim == 2 and theirs.shape[0] != ours.shape[0] and theirs.shape[1] == ours.shape[1]:
            fresh = {name for name in (f"{head}.weight", f"{head}.bias") if name in target}
            notes.append(f"the head '{head}' has {theirs.shape[0]} classes in the weights and {ours.shape[0]} here: it starts fresh")
    stem = next((name for name, value in target.items() if value.ndim == 4), None)
    if stem and stem in state and state[stem].ndim == 4:
        theirs, ours = state[stem], target[stem]
        if {theirs.shape[1], ours.shape[1]} == {1, 3} and theirs.shape[0] == ours.shape[0] and theirs.shape[2:] == ours.shape[2:]:
            # Summed weights see in a grey image what the three saw in an RGB image of equal channels; the way back divides.
            state[stem] = theirs.sum(1, keepdim=True) if ours.shape[1] == 1 else theirs.expand(-1, 3, -1, -1) / 3
            notes.append(f"the stem '{stem}' was converted from {theirs.shape[1]} to {ours.shape[1]} input channels")
    return fresh


def _num_outputs(state: Mapping[str, Tensor], path: Path) -> int:
    head = _head(state)
    if head is None:
        raise UserError(f"{path} has no linear layer at its end, so it is no classifier that we can load")
    return int(state[f"{head}.weight"].shape[0])


def _num_inputs(state: Mapping[str, Tensor]) -> int:
    return next((int(value.shape[1]) for value in state.values() if value.ndim == 4 and value.shape[1] in (1, 3)), 3)


def default_size(name: str) -> int:
    """Return the side of the input that an architecture is usually given, pixels."""
    return 32 if name.startswith(("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg16-cifar")) else 224


def _read_yolov5(path: Path, refusal: NeedsCode) -> WeightsFile:
    """Take the tensors and class names out of an official YOLOv5 classifier, none of whose code is run."""
    try:
        content = pickled_tensors.read_pickled(path)
        candidates = [content.get("ema"), content.get("model")] if isinstance(content, dict) else [content]
        return _from_module(next(value for value in candidates if pickled_tensors.is_module(value)), path)
    except Exception:  # what a hostile file holds can be of any shape
        raise refusal from None


def _from_module(module: Any, path: Path) -> WeightsFile:
    state = {name: value.float() if value.is_floating_point() else value for name, value in pickled_tensors.module_tensors(module).items()}
    name, num_classes, channels = identify(state, path), _num_outputs(state, path), _num_inputs(state)
    names = module.state.get("names")
    names = [names.get(i) for i in range(num_classes)] if isinstance(names, dict) else names
    named = isinstance(names, list) and len(names) == num_classes and all(isinstance(n, str) for n in names)
    spec = ModelSpec(name, num_classes, channels=channels, class_names=tuple(names) if named else ())
    with torch.device("meta"):
        built = {key: layer.eps for key, layer in build(spec).named_modules() if isinstance(layer, nn.BatchNorm2d)}
    stored = pickled_tensors.module_values(module, "eps")
    differing = {key: float(stored[key]) for key, eps in built.items() if key in stored and stored[key] != eps}
    return WeightsFile(path, state, spec.with_(norm_eps=differing), named=named)
