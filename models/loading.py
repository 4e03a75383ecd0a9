"""Read weights of any origin (ours, plain state dicts, official YOLOv5 files) and build the classifier that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.networks import build, resolve_model
from models.networks.plain import VGG_DEPTHS
from models.networks.resnet import CIFAR_DEPTHS, pad_sources
from models.networks.widths import group_counts, is_depthwise, resize_
from models.quantized.preparing import prepare_
from models.spelling import respelled
from models.state_dicts import count_channels, count_classes, find_head, find_stem, identify, is_narrower, load_state_, rename_head
from utils.errors import UserError
from utils.files import pickled_tensors
from utils.files.checkpoint import NeedsCode, check_version, find_state_dict, is_checkpoint, read_tensor_file
from utils.modes import eval_mode
from utils.options import plain
from utils.spec import ModelSpec

MOST_TIMES, FREE_ELEMENTS = 1_000, 1 << 24  # a described network may have so many times a file's numbers, or so many
FOR_CIFAR = (
    *(f"{kind}resnet{depth}" for kind in ("", "preact-") for depth in CIFAR_DEPTHS),
    *(f"vgg{depth}{norm}-distiller" for depth in VGG_DEPTHS for norm in ("", "-bn")),
    *("vgg16-cifar", "googlenet-cifar", "densenet40", "plain20"),
)


@dataclass
class WeightsFile:
    """What a weights file holds, before any network is built.

    Attributes:
        spec: which network it is, where the file tells.
        checkpoint: the whole content of one of our own checkpoints, else empty.
        named: whether the file holds the class names; else they are placeholders.
        notes: what was left out or assumed, for the user to read.
    """

    path: Path
    state: dict[str, Tensor]
    spec: ModelSpec | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    named: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass
class LoadedClassifier:
    """A network with its weights.

    Attributes:
        notes: what was adapted while loading, for the user to read.
        checkpoint, named: as in the ``WeightsFile``.
    """

    model: nn.Module
    spec: ModelSpec
    notes: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    named: bool = True


def load_classifier(weights: str | Path, model_name: str | None = None, size_known: bool = False) -> LoadedClassifier:
    """Read a weights file and build the network that it describes, with its weights.

    Args:
        weights: one of our checkpoints, a plain state dict, or an official YOLOv5 classifier.
        model_name: the architecture of a plain state dict; without it, our own architectures are compared by shapes.
        size_known: whether the images' size is given otherwise, so that nothing need be said where the file does not tell.

    Raises:
        UserError: the file is not readable, or its architecture is not known.
    """
    file = read_weights(weights, model_name, size_known)
    check_name(file, model_name)
    spec = file.spec or _spec_of_state_dict(file, model_name)
    model = build_as(spec, file)
    notes = load_state_(model, file.state)
    return LoadedClassifier(model, spec, [*file.notes, *notes], file.checkpoint, file.named)


def read_weights(path: str | Path, model_name: str | None = None, size_known: bool = False) -> WeightsFile:
    """Read a weights file of any origin without running code from it; see ``load_classifier``.

    Raises:
        UserError: the file is absent, damaged, foreign, or needs code to load.
    """
    path = weights_of_run(Path(path))
    try:
        content = read_tensor_file(path)
    except NeedsCode as refusal:
        return _read_pickled(path, refusal, model_name, size_known)
    if not is_checkpoint(content):
        return WeightsFile(path, {plain(name): value for name, value in find_state_dict(content, path).items()}, named=False)
    content = check_version(content, path)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content["state_dict"].items()):
        raise UserError(f"{path} is damaged: its state dict must map names to tensors")
    return WeightsFile(path, content["state_dict"], ModelSpec.from_dict(content["spec"]), content)


def weights_of_run(path: Path) -> Path:
    """Return the best weights in a run's folder; any other path as it is."""
    return next((file for name in ("best", "pruned") if (file := path / "weights" / f"{name}.pt").is_file()), path)


def check_name(file: WeightsFile, model_name: str | None) -> None:
    """Refuse a file of another architecture than the one that was asked for."""
    if model_name and file.spec and resolve_model(model_name)[0] != file.spec.name:
        raise UserError(f"--model {model_name} does not go with {file.path}, which is a {file.spec.name}; leave --model out")


def default_size(name: str) -> int:
    """Return the usual side of an architecture's input, pixels."""
    return 32 if name.startswith(FOR_CIFAR) else 224


def build_as(spec: ModelSpec, file: WeightsFile) -> nn.Module:
    """Build a network for a file's weights, which are not loaded yet: as narrow as they are, and quantized if they are.

    The shapes of the tensors give the widths if the file has a pruning plan, or comes from elsewhere and its tensors have
    fewer channels; it then gets a plan that names no group. The names of a file from elsewhere become the network's. The
    head has the specification's classes in any case, and the stem its input channels.

    Raises:
        UserError: no network of this kind has such shapes, or what the checkpoint says of them is damaged.
    """
    _check_cost(spec, file)
    model = build(spec)
    if not file.checkpoint:
        file.state, notes = respelled(file.state, model.state_dict())
        file.state = rename_head(file.state, model.state_dict(), notes)
        file.notes += notes
        if is_narrower(file.state, model.state_dict()):
            file.checkpoint = {"plan": {"kept": {}, "sizes": {}}}
    plan = file.checkpoint.get("plan")
    if not isinstance(plan, dict | None):
        raise UserError(f"{file.path} is damaged: its pruning plan must be a mapping, not {type(plan).__name__}")
    if plan:
        _narrow_(model, spec, file)
    if spec.quantization:
        try:
            prepare_(model, spec.quantization)
        except UserError as error:
            raise UserError(f"{file.path} is damaged, or of another version: {error}") from None
    return model


def _check_cost(spec: ModelSpec, file: WeightsFile) -> None:
    """Refuse a file whose network would take far more memory than the file's own tensors: what it says of itself is not to be trusted.

    Only networks that a file describes are looked at; the others have the sizes of their names.
    """
    held = sum(tensor.numel() for tensor in file.state.values())
    if spec.definition is None:
        return
    with torch.device("meta"):
        built = sum(tensor.numel() for tensor in build(spec).state_dict().values())
    if built > max(MOST_TIMES * held, FREE_ELEMENTS):
        raise UserError(f"{file.path} is damaged: it describes a network of {built:,} numbers and holds {held:,}")


def _narrow_(model: nn.Module, spec: ModelSpec, file: WeightsFile) -> None:
    """Give a network the widths of a file's tensors, in place."""
    target = model.state_dict()
    state = {name: tensor for name, tensor in file.state.items() if name in target and tensor.ndim == target[name].ndim}
    head, stem = find_head(target), find_stem(target)
    for name, dim in ((f"{head}.weight", 0), (f"{head}.bias", 0), (f"{stem}", 1)):
        if name in state and state[name].shape[dim] != target[name].shape[dim]:
            shape = list(state[name].shape)
            shape[dim] = target[name].shape[dim]
            state[name] = state[name].new_empty(shape, device="meta")
    _check_groups(spec, model, file.path)
    state |= pad_sources(model, state)
    depthwise = {name: len(state[f"{name}.weight"]) for name, module in model.named_modules() if is_depthwise(module)}
    try:
        resize_(model, state, {**depthwise, **spec.groups})
        model.load_state_dict({name: value for name, value in state.items() if not value.is_floating_point()}, strict=False)
        with eval_mode(model), torch.no_grad():  # widths that do not fit together raise here, not later
            model(torch.zeros(1, spec.channels, *spec.size))
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{file.path} is damaged: its shapes are not those of a {spec.name} at {spec.size_text} ({reason})") from None


def _check_groups(spec: ModelSpec, model: nn.Module, path: Path) -> None:
    grouped = group_counts(model)
    for name, count in spec.groups.items() if isinstance(spec.groups, dict) else [("", 0)]:
        if name not in grouped or type(count) is not int or count < 1:
            raise UserError(f"{path} is damaged: it gives {count!r} groups to '{name}'; it must give a grouped layer a number above 0")


def _spec_of_state_dict(file: WeightsFile, model_name: str | None) -> ModelSpec:
    name, definition = resolve_model(model_name) if model_name else (identify(file.state, file.path), None)
    num_classes = count_classes(file.state, file.path)
    return ModelSpec(name, num_classes, default_size(name), count_channels(file.state), definition=definition)


def _read_pickled(path: Path, refusal: NeedsCode, model_name: str | None, size_known: bool) -> WeightsFile:
    """Take the tensors, and of a pickled network the class names, out of a file without running its code."""
    try:
        content = pickled_tensors.read_pickled(path)
        candidates = [content.get(key) for key in ("ema", "model", "net", "state_dict")] if isinstance(content, dict) else [content]
        if module := next((value for value in candidates if pickled_tensors.is_module(value)), None):
            network = pickled_tensors.module_tensors(module)
        else:
            state, left_out = find_state_dict(content, path), sorted(pickled_tensors.classes_in(content))
    except Exception:  # a hostile file can hold anything
        raise refusal from None
    if module:
        try:
            return _from_module(module, network, path, model_name, size_known)
        except UserError:
            if model_name:
                raise
            raise NeedsCode(f"{refusal}, or name its architecture with --model") from None
        except Exception:
            raise refusal from None
    note = f"{path} holds more than tensors, which was left out since reading it could run code: {', '.join(left_out[:4])}"
    return WeightsFile(path, {plain(name): value for name, value in state.items()}, named=False, notes=[note])


def _from_module(module: Any, tensors: dict[str, Tensor], path: Path, model_name: str | None, size_known: bool) -> WeightsFile:
    state = {plain(name): value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    num_classes = count_classes(state, path)
    name, definition = resolve_model(model_name) if model_name else (identify(state, path), None)
    spec = ModelSpec(name, num_classes, channels=count_channels(state), definition=definition)
    names = module.state.get("names")
    names = [names.get(i) for i in range(num_classes)] if isinstance(names, dict) else names
    named = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    if named:
        spec = spec.with_(class_names=tuple(names))
    with torch.device("meta"):
        built = {name: layer.eps for name, layer in build(spec).named_modules() if isinstance(layer, nn.BatchNorm2d)}
    stored = pickled_tensors.module_values(module, "eps")
    differing = {name: float(stored[name]) for name, eps in built.items() if name in stored and stored[name] != eps}
    note = f"{path} does not tell the size of its images: {spec.size_text} is assumed; if it was trained at another, give --imgsz"
    return WeightsFile(path, state, spec.with_(norm_eps=differing), named=named, notes=[] if size_known else [note])
