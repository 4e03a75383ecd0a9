"""From arguments to data, network and augmentation: everything that a run needs before it starts."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.pruning.narrowing import build_narrow, load_model, scores_of_files
from compression.training.arguments import TrainArguments
from models.loading import WeightsFile, build_as, check_name, identify, load_state_, read_weights
from models.networks import ARCHITECTURES, build, cut_off, load_definition_of, resolve_model
from models.networks.widths import group_counts
from utils import distributed
from utils.data.caching import cache_split
from utils.data.datasets import DATA_DIR, load_data, with_validation
from utils.data.images import READ_MARGIN
from utils.data.loaders import check_balance
from utils.data.splits import ImageData
from utils.data.transforms import Augmentation, augmentation
from utils.errors import UserError
from utils.loop.optim import NORMS
from utils.spec import ModelSpec

DEFAULT_MODEL, DEFAULT_SIZE = "yolov5n-cls", 224


@dataclass
class Prepared:
    """What a run starts from.

    Attributes:
        plan: which channels of the dense network are left, where some were cut; goes on into the run's checkpoints.
        notes: what was mended or assumed on the way.
    """

    arguments: TrainArguments
    data: ImageData
    spec: ModelSpec
    model: nn.Module
    augmentation: Augmentation
    plan: dict[str, Any] | None
    notes: list[str]


def prepare(arguments: TrainArguments, checkpoint: dict[str, Any] | None = None) -> Prepared:
    """Load the data and build the network, with weights where some are given.

    Args:
        arguments: as given; the returned ones have the data set's and the weights' own values filled in.
        checkpoint: of a run that is resumed; it then says what the network is.

    Raises:
        UserError: something does not fit; the message says what.
    """
    check_balance(arguments.balance)
    if not distributed.is_main():
        distributed.barrier()  # rank 0 downloads first
    data = load_data(arguments.data, download=arguments.download)
    if distributed.is_main():
        distributed.barrier()
    data = with_validation(data, arguments.val_fraction, arguments.seed)
    notes: list[str] = []
    if checkpoint:
        spec, plan = ModelSpec.from_dict(checkpoint["spec"]), checkpoint.get("plan")
        file = WeightsFile(Path("last.pt"), checkpoint["state_dict"], spec, checkpoint)
        data, model = data.for_classes(spec.class_names), build_as(spec, file)
    else:
        spec, model, plan, notes = _network(arguments, data)
        if set(spec.class_names) == set(data.class_names):
            data = data.for_classes(spec.class_names)
    preset = arguments.augment or data.augment
    fliplr = data.fliplr if arguments.fliplr is None else arguments.fliplr
    chosen = augmentation(preset, fliplr=fliplr, policy=arguments.auto_augment, erasing=arguments.erasing)
    if arguments.cache:
        data, lines = _cached(data, arguments.cache, spec)
        notes += lines
    data_name = os.path.abspath(arguments.data) if Path(arguments.data).exists() and arguments.data != "digits" else arguments.data
    resolved = replace(arguments, data=data_name, imgsz=spec.imgsz, channels=spec.channels, augment=preset, fliplr=fliplr, resume="")
    if data.unreadable:
        notes.append(f"{len(data.unreadable)} images can't be read and are skipped; unreadable.txt in the run's folder lists them")
    return Prepared(resolved, data, spec, model, chosen, plan, notes)


def _network(arguments: TrainArguments, data: ImageData) -> tuple[ModelSpec, nn.Module, dict[str, Any] | None, list[str]]:
    """Choose the specification, build the network, load the weights, narrow where that is asked for."""
    if arguments.ranks and not arguments.compress_rate:
        raise UserError("--ranks goes with --compress_rate: it says which channels stay")
    if arguments.weights and arguments.pretrained:
        raise UserError("--weights and --pretrained exclude each other: both say where the weights come from")
    file = read_weights(arguments.weights) if arguments.weights else None
    spec = _spec_of_file(file, arguments) if file else _spec_of_name(arguments.model or DEFAULT_MODEL, arguments.pretrained)
    old = spec
    names = spec.class_names if set(spec.class_names) == set(data.class_names) else data.class_names
    inherited = file is not None and file.spec is not None
    channels = arguments.channels or (spec.channels if inherited else data.channels)
    imgsz = arguments.imgsz or (spec.imgsz if inherited or arguments.pretrained else data.imgsz or DEFAULT_SIZE)
    changes: dict[str, Any] = {"num_classes": len(names), "class_names": tuple(names), "imgsz": imgsz, "channels": channels}
    if channels != spec.channels:
        default = ModelSpec(spec.name, 1, channels=channels)
        changes |= {"mean": default.mean, "std": default.std}
    if arguments.dropout is not None:
        changes["dropout"] = arguments.dropout
    if arguments.cutoff is not None:
        changes["definition"] = cut_off(spec.definition or load_definition_of(spec.name), arguments.cutoff)
    spec = spec.with_(**changes)
    if arguments.pretrained:
        from models.networks.external import pretrained_state

        model = build(spec)
        notes, plan = load_state_(model, pretrained_state(spec.name)), None
    elif file is None:
        model, notes, plan = build(spec), [], None
    else:
        other_classes = inherited and old.num_classes == spec.num_classes and set(old.class_names) != set(spec.class_names)
        model, plan = build_as(spec, file), file.checkpoint.get("plan")
        notes = load_state_(model, file.state, fresh_head=other_classes)
        if file.spec is None and old.num_classes == spec.num_classes:
            notes.append("the weights carry no class names; their outputs are taken in the order of the data's classes")
    if arguments.compress_rate:
        spec, model, plan = _narrowed(arguments, spec, model, plan)
    return spec, model, plan, notes


def _narrowed(
    arguments: TrainArguments, spec: ModelSpec, dense: nn.Module, before: dict[str, Any] | None
) -> tuple[ModelSpec, nn.Module, dict[str, Any]]:
    """Build the network at the widths of --compress_rate, with the dense network's weights where it has some."""
    has_weights = bool(arguments.weights or arguments.pretrained)
    if before:
        raise UserError(f"{arguments.weights} is pruned already; to cut it further use prune.py")
    if spec.quantization:
        raise UserError(f"{arguments.weights} is quantized, so its channels can't be cut: prune first, then train quantized")
    if has_weights != bool(arguments.ranks):
        raise UserError(
            "--compress_rate with --weights needs --ranks FOLDER, the ranks that prune.py writes: python prune.py --weights "
            f"{arguments.weights} --data {arguments.data} --compress_rate ..."
            if has_weights
            else "--ranks needs --weights: it says which channels of a trained network stay"
        )
    narrow = build_narrow(spec, arguments.compress_rate)
    plan: dict[str, Any] = {
        "kept": {},
        "sizes": {name: narrow.graph.group(name).size for name in narrow.widths},
        "widths": dict(narrow.widths),
    }
    if has_weights:
        scores = scores_of_files(arguments.ranks, dense, narrow.graph)
        orders = {name: score.order.tolist() for name, score in scores.items()}
        noise = torch.randn(2, spec.channels, spec.imgsz, spec.imgsz, generator=torch.Generator().manual_seed(0))
        loaded = load_model(narrow.model, dense.state_dict(), orders, noise, groups=group_counts(dense))
        plan |= loaded.to_dict()
    return narrow.spec, narrow.model, plan


def _spec_of_file(file: WeightsFile, arguments: TrainArguments) -> ModelSpec:
    check_name(file, arguments.model)
    if file.spec is not None:
        return file.spec
    wanted, definition = resolve_model(arguments.model) if arguments.model else ("", None)
    return ModelSpec(wanted or identify(file.state, file.path), 1, definition=definition)


def _spec_of_name(name: str, pretrained: bool) -> ModelSpec:
    name, definition = resolve_model(name)
    if not pretrained:
        return ModelSpec(name, 1, definition=definition)
    if definition is not None or name in ARCHITECTURES:
        raise UserError(f"--pretrained is for torchvision's and timm's networks; for '{name}' give a file with --weights")
    from models.networks.external import pretrained_preprocessing

    return ModelSpec(name, 1, **pretrained_preprocessing(name))


def _cached(data: ImageData, kind: str, spec: ModelSpec) -> tuple[ImageData, list[str]]:
    """Cache train and val; rank 0 first, so that only one process writes the file of a disk cache."""
    splits, lines, bad = dict(data.splits), [], []
    if not distributed.is_main():
        distributed.barrier()
    for name in ("train", "val"):
        cached, line = cache_split(data.splits[name], kind, spec.channels, spec.imgsz * READ_MARGIN, DATA_DIR / "cache")
        splits[name], unreadable = cached.readable()
        bad += unreadable
        lines.append(f"{name}: {line}")
    if distributed.is_main():
        distributed.barrier()
    return replace(data, splits=splits, unreadable=[*data.unreadable, *bad]), lines


def freeze_(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """Freeze parameters, in place, and return the normalisation layers among them (see ``FrozenNorms``).

    Args:
        model: a network.
        patterns: a number n freezes the first n layers (``model.0`` ... of a YAML network, else the first n modules
            that hold parameters); anything else is a shell pattern for module names.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, module in model.named_modules() if name]
    layers = getattr(model, "model", model)
    prefix = "model." if layers is not model else ""
    ordered = [prefix + name for name, child in layers.named_children() if next(child.parameters(), None) is not None]
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern.isdigit() and pattern not in names:
            if int(pattern) >= len(ordered):
                raise UserError(
                    f"freeze is {pattern}; this network has {len(ordered)} layers, so fewer than that can be frozen: {', '.join(ordered)}"
                )
            frozen.update(ordered[: int(pattern)])
        elif matched := fnmatch.filter(names, pattern):
            frozen.update(matched)
        else:
            raise UserError(f"freeze: the pattern '{pattern}' matches no module; the outermost are: {', '.join(ordered)}")
    modules = dict(model.named_modules())
    for name in frozen:
        modules[name].requires_grad_(False)
    return [m for name in sorted(frozen) for m in modules[name].modules() if isinstance(m, NORMS)]
