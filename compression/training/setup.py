"""From arguments to data, network and augmentation: everything that a run needs before it starts."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.pruning.narrowing import build_narrow, load_model
from compression.pruning.recovery import Recovery, recover_
from compression.scoring.calibration import sample
from compression.scoring.criteria import score_by_files
from compression.training.arguments import TrainArguments
from compression.training.recipes import Recipe, choose_recipe, default_recipe
from models.loading import WeightsFile, build_as, check_name, read_weights
from models.networks import ARCHITECTURES, build, cut_off, load_definition_of, resolve_model
from models.networks.widths import group_counts
from models.state_dicts import identify, load_state_
from utils import distributed
from utils.data.caching import cache_split
from utils.data.checking import unreadable_notes
from utils.data.datasets import DATA_DIR, load_data, with_validation
from utils.data.images import READ_MARGIN
from utils.data.inspection import Finding, inspect
from utils.data.loaders import check_balance
from utils.data.shards import is_shards
from utils.data.splits import ImageData
from utils.data.transforms import Augmentation, augmentation
from utils.errors import UserError
from utils.loop.norms import NormWarmup
from utils.loop.optim import NORMS
from utils.output.commands import command
from utils.spec import ModelSpec, image_size

DEFAULT_MODEL, DEFAULT_SIZE = "yolov5n-cls", 224
REFIT_IMAGES, REFIT_BATCH = 512, 32


@dataclass
class Network:
    """The network that a run starts from.

    Attributes:
        plan: which channels of the dense network are left, where some were cut; the run's checkpoints keep it.
        notes: what was mended or assumed on the way.
        fresh_norms: whether batch norms have no statistics yet that fit: the network is new, or was cut and not refitted.
        refitted: whether the weights were refitted to the statistics of batch norm, and nothing was trained since.
        dense: "path" and "sha256" of the dense network's file, where the weights were cut from one with the same classes.
    """

    spec: ModelSpec
    model: nn.Module
    plan: dict[str, Any] | None
    notes: list[str]
    fresh_norms: bool
    dense: Mapping[str, Any] | None = None
    refitted: bool = False


@dataclass
class Setup:
    """What a run starts from; in ``arguments`` the values of the recipe, the data set and the weights are filled in."""

    arguments: TrainArguments
    recipe: Recipe
    data: ImageData
    augmentation: Augmentation
    network: Network
    findings: list[Finding]


def set_up(arguments: TrainArguments, checkpoint: dict[str, Any] | None = None) -> Setup:
    """Load the data and build the network, from the checkpoint of the run that is resumed if there is one.

    Raises:
        UserError: something does not fit; the message says what.
    """
    check_balance(arguments.balance)
    with distributed.main_first():  # which downloads
        data = load_data(arguments.data, download=arguments.download, max_pixels=arguments.max_pixels)
    data = with_validation(data, arguments.val_fraction, arguments.seed)
    network = _resumed_network(checkpoint) if checkpoint else _new_network(arguments, data)
    spec, notes = network.spec, network.notes
    if checkpoint or set(spec.class_names) == set(data.class_names):
        data = data.for_classes(spec.class_names)
    trained = bool(arguments.weights or arguments.pretrained)
    name = arguments.recipe or default_recipe(trained, bool(arguments.compress))
    steps = len(data.split("train")) * arguments.effective_train_size / arguments.batch_size / arguments.accumulate
    recipe = choose_recipe(name, vars(arguments), data.augment, spec.longest, max(steps, 1))
    fliplr = data.fliplr if arguments.fliplr is None else arguments.fliplr
    augment = augmentation(recipe.augment, fliplr=fliplr, policy=arguments.auto_augment, erasing=arguments.erasing)
    findings = inspect(data, spec)
    notes += [f"data: {finding.text}" for finding in findings]
    if arguments.cache:
        data = _cached(data, arguments.cache, spec, notes)
    notes += unreadable_notes(data.unreadable)
    freeze_norms = network.refitted and not arguments.compress if arguments.freeze_norms is None else arguments.freeze_norms
    filled = {**asdict(recipe), "freeze_norms": freeze_norms, "imgsz": spec.imgsz, "channels": spec.channels, "fliplr": fliplr}
    resolved = replace(_with_absolute_paths(arguments), resume="", **filled)
    return Setup(resolved, recipe, data, augment, network, findings)


def make_repeatable(seed: int, deterministic: bool) -> None:
    """Seed torch, and allow deterministic operations only if asked to."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def _with_absolute_paths(arguments: TrainArguments) -> TrainArguments:
    """Return the arguments with the paths of data, schedule and teacher from the root, so that a run resumes from any folder."""
    files: dict[str, str] = {name: getattr(arguments, name) for name in ("compress", "kd_teacher", "kd_resume")}
    absolute: dict[str, Any] = {name: os.path.abspath(file) for name, file in files.items() if Path(file).is_file()}
    if arguments.data != "digits" and (Path(arguments.data).exists() or is_shards(arguments.data)):
        absolute["data"] = os.path.abspath(arguments.data)
    return replace(arguments, **absolute)


def _resumed_network(checkpoint: dict[str, Any]) -> Network:
    spec = ModelSpec.from_dict(checkpoint["spec"])
    file = WeightsFile(Path("last.pt"), checkpoint["state_dict"], spec, checkpoint)
    began_with_fresh_norms = NormWarmup.__name__ in checkpoint["training"]["hooks"]
    return Network(spec, build_as(spec, file), checkpoint.get("plan"), [], began_with_fresh_norms)


def _new_network(arguments: TrainArguments, data: ImageData) -> Network:
    """Choose the specification, build the network, load its weights, and narrow it if --compress_rate says so."""
    if arguments.ranks and not arguments.compress_rate:
        raise UserError("--ranks goes with --compress_rate: it says which channels stay")
    if arguments.weights and arguments.pretrained:
        raise UserError("--weights and --pretrained exclude each other: both say where the weights come from")
    file = read_weights(arguments.weights, arguments.model, arguments.imgsz is not None) if arguments.weights else None
    trained = _spec_of_file(file, arguments) if file else _spec_of_name(arguments.model or DEFAULT_MODEL, arguments.pretrained)
    spec = _spec_for_data(trained, file, arguments, data)
    if file:
        network = _with_weights(spec, trained, file)
    elif arguments.pretrained:
        from models.networks.external import pretrained_state

        model = build(spec)
        network = Network(spec, model, None, load_state_(model, pretrained_state(spec.name)), fresh_norms=False)
    else:
        network = Network(spec, build(spec), None, [], fresh_norms=True)
    return _narrowed(arguments, network, data) if arguments.compress_rate else network


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


def _spec_for_data(spec: ModelSpec, file: WeightsFile | None, arguments: TrainArguments, data: ImageData) -> ModelSpec:
    """Give the network the data's classes, and the input that the flags, the weights or the data ask for, in that order."""
    inherited = file is not None and file.spec is not None
    names = spec.class_names if set(spec.class_names) == set(data.class_names) else data.class_names
    channels = arguments.channels or (spec.channels if inherited else data.channels)
    imgsz = image_size(arguments.imgsz) or (spec.imgsz if inherited or arguments.pretrained else data.imgsz or DEFAULT_SIZE)
    changes: dict[str, Any] = {"num_classes": len(names), "class_names": tuple(names), "imgsz": imgsz, "channels": channels}
    if channels != spec.channels:
        default = ModelSpec(spec.name, 1, channels=channels)
        changes |= {"mean": default.mean, "std": default.std}
    if arguments.fit:
        changes["fit"] = arguments.fit
    if arguments.dropout is not None:
        changes["dropout"] = arguments.dropout
    if arguments.cutoff is not None:
        changes["definition"] = cut_off(spec.definition or load_definition_of(spec.name), arguments.cutoff)
    return spec.with_(**changes)


def _with_weights(spec: ModelSpec, trained: ModelSpec, file: WeightsFile) -> Network:
    """Build the network with a file's weights; the head stays fresh if the classes are others, even if they are as many."""
    model, as_many = build_as(spec, file), trained.num_classes == spec.num_classes
    other_classes = file.spec is not None and as_many and set(trained.class_names) != set(spec.class_names)
    notes = [*file.notes, *load_state_(model, file.state, fresh_head=other_classes)]
    if file.spec is None and as_many:
        notes.append("the weights carry no class names; their outputs are taken in the order of the data's classes")
    plan = file.checkpoint.get("plan")
    dense = file.checkpoint.get("dense") if as_many and not other_classes else None
    refitted = bool(file.checkpoint.get("refitted"))
    return Network(spec, model, plan, notes, fresh_norms=bool(plan) and not refitted, dense=dense, refitted=refitted and dense is not None)


def _narrowed(arguments: TrainArguments, dense: Network, data: ImageData) -> Network:
    """Build the network at the widths of --compress_rate, with the dense network's weights if it has some."""
    spec, has_weights = dense.spec, bool(arguments.weights or arguments.pretrained)
    if dense.plan:
        raise UserError(f"{arguments.weights} is pruned already; leave --compress_rate out, or cut it further with prune.py")
    if spec.quantization:
        raise UserError(f"{arguments.weights} is quantized, so its channels can't be cut: prune first, then train quantized")
    if has_weights and not arguments.ranks:
        raise UserError(
            "--compress_rate with --weights needs --ranks FOLDER, the ranks that prune.py writes: "
            f"{command('prune', weights=arguments.weights, data=arguments.data)} --compress_rate ..."
        )
    if arguments.ranks and not has_weights:
        raise UserError("--ranks needs --weights: it says which channels of a trained network stay")
    narrow = build_narrow(spec, arguments.compress_rate)
    sizes = {name: narrow.graph.group(name).size for name in narrow.widths}
    plan: dict[str, Any] = {"kept": {}, "sizes": sizes, "widths": dict(narrow.widths)}
    refitted = False
    if has_weights:
        orders = score_by_files(arguments.ranks, dense.model, narrow.graph, spec.name).orders
        noise = torch.randn(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
        loaded = load_model(narrow.model, dense.model.state_dict(), orders, noise, groups=group_counts(dense.model))
        plan |= loaded.to_dict()
        if arguments.refit:
            images = sample(data.split("train"), narrow.spec, REFIT_IMAGES, REFIT_BATCH, arguments.seed)
            for step, seconds in recover_(narrow.model, dense.model, narrow.graph, loaded.kept, images, Recovery(seed=arguments.seed)):
                dense.notes.append(f"{step} on {len(images)} training images, in {seconds:.1f} s")
                refitted |= step == "refitted"
    return Network(narrow.spec, narrow.model, plan, dense.notes, fresh_norms=not refitted, refitted=refitted)


def _cached(data: ImageData, kind: str, spec: ModelSpec, notes: list[str]) -> ImageData:
    """Cache train and val, on rank 0 first, so that one process alone writes the file of a disk cache."""
    splits, unreadable = dict(data.splits), list(data.unreadable)
    with distributed.main_first():
        for name in ("train", "val"):
            cached, line = cache_split(data.splits[name], kind, spec.channels, spec.longest * READ_MARGIN, DATA_DIR / "cache")
            splits[name], bad = cached.readable()
            unreadable += bad
            notes.append(f"{name}: {line}")
    return replace(data, splits=splits, unreadable=unreadable)


def freeze_(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """Freeze parameters, in place, and return the normalisation layers among them (see ``FrozenNorms``).

    Args:
        model: a network.
        patterns: a number n freezes the first n layers (``model.0`` ... of a YAML network, otherwise the first n modules
            that hold parameters); anything else is a shell pattern for module names.

    Raises:
        UserError: a pattern matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    layers = getattr(model, "model", model)
    prefix = "model." if layers is not model else ""
    ordered = [prefix + name for name, child in layers.named_children() if next(child.parameters(), None) is not None]
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern.isdigit() and pattern not in modules:
            if int(pattern) >= len(ordered):
                raise UserError(f"freeze is {pattern}; it must be less than the network's {len(ordered)} layers: {', '.join(ordered)}")
            frozen.update(ordered[: int(pattern)])
        elif matched := fnmatch.filter(modules, pattern):
            frozen.update(matched)
        else:
            raise UserError(f"freeze: the pattern '{pattern}' matches no module; the outermost are: {', '.join(ordered)}")
    for name in frozen:
        modules[name].requires_grad_(False)
    return [norm for name in sorted(frozen) for norm in modules[name].modules() if isinstance(norm, NORMS)]
