"""Networks: ``build(spec)`` builds any of them. A new architecture is one line in ``ARCHITECTURES``; torchvision's and timm's need none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.networks import own
from models.networks.attention import with_heads
from models.networks.densenet import CifarDenseNet
from models.networks.googlenet import CifarGoogLeNet
from models.networks.mobilenet import MobileNetV1, MobileNetV1Sequential, MobileNetV2
from models.networks.plain import VGG_DEPTHS, Plain20, PlainVGG
from models.networks.plain_weights import fold_weights_
from models.networks.preact_resnet import CifarPreactResNet, PreactResNet
from models.networks.resnet import CIFAR_DEPTHS, IMAGENET_DEPTHS, Bottleneck, CifarResNet, ResNet
from models.networks.vgg import CifarVGG
from models.networks.yolo import build_yolo, rows_of, scaled
from utils.errors import UserError, unknown
from utils.files.yaml_files import read_yaml
from utils.loop.memory_format import keep_contiguous_
from utils.spec import ModelSpec

Builder = Callable[[int, int], nn.Module]  # (num_classes, channels) -> network

YOLO = {f"{family}{size}-cls": (family, size) for family in ("yolov5", "yolov8", "yolo11") for size in "nsmlx"}  # name -> family, size


def load_definition_of(name: str) -> dict[str, Any]:
    """Return the YAML definition of one of our own networks.

    Raises:
        UserError: the network is not described by a YAML file.
    """
    if name not in YOLO:
        raise UserError(f"'{name}' is not described by a YAML file; those that are: {', '.join(YOLO)}")
    path = Path(__file__).with_name(f"{name}.yaml")
    if path.exists():
        return read_yaml(path, "model")
    family, size = YOLO[name]
    return scaled(read_yaml(path.with_name(f"{family}-cls.yaml"), "model"), size)


def _yolo(name: str, num_classes: int, channels: int) -> nn.Module:
    return build_yolo(load_definition_of(name), num_classes, channels)


ARCHITECTURES: dict[str, Builder] = {
    **{name: partial(_yolo, name) for name in YOLO},
    **{f"resnet{depth}": partial(CifarResNet, (depth - 2) // 6, True) for depth in CIFAR_DEPTHS},
    **{f"resnet{depth}-b": partial(CifarResNet, (depth - 2) // 6, False) for depth in CIFAR_DEPTHS},
    **{f"resnet{depth}": partial(ResNet, *block_and_depths) for depth, block_and_depths in IMAGENET_DEPTHS.items()},
    **{f"preact-resnet{depth}": partial(CifarPreactResNet, (depth - 2) // 6, False) for depth in CIFAR_DEPTHS},
    **{f"preact-resnet{depth}-b": partial(CifarPreactResNet, (depth - 2) // 6, True) for depth in CIFAR_DEPTHS},
    **{f"preact-resnet{depth}": partial(PreactResNet, block is Bottleneck, depths) for depth, (block, depths) in IMAGENET_DEPTHS.items()},
    "vgg16-cifar": CifarVGG,
    **{f"vgg{depth}-distiller": partial(PlainVGG, depth, False) for depth in VGG_DEPTHS},
    **{f"vgg{depth}-bn-distiller": partial(PlainVGG, depth, True) for depth in VGG_DEPTHS},
    "plain20": partial(Plain20, True),
    "plain20-nobn": partial(Plain20, False),
    "googlenet-cifar": CifarGoogLeNet,
    "densenet40": CifarDenseNet,
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v1-distiller": MobileNetV1Sequential,
    "mobilenet-v2-hrank": MobileNetV2,
}
# Names from HRank and Distiller. Two of HRank's, googlenet and mobilenet_v2, are torchvision's and mean its networks.
ALIASES = {
    "vgg_16_bn": "vgg16-cifar",
    "densenet_40": "densenet40",
    "mobilenet_v1": "mobilenet-v1",
    "mobilenet": "mobilenet-v1-distiller",
    "plain20_cifar": "plain20",
    "plain20_cifar_nobn": "plain20-nobn",
    **{f"vgg{n}_cifar": f"vgg{n}-distiller" for n in VGG_DEPTHS},
    **{f"vgg{n}_bn_cifar": f"vgg{n}-bn-distiller" for n in VGG_DEPTHS},
    **{f"preact_resnet{n}": f"preact-resnet{n}" for n in IMAGENET_DEPTHS},
    **{f"preact_resnet{n}_cifar": f"preact-resnet{n}" for n in CIFAR_DEPTHS},
    **{f"preact_resnet{n}_cifar_conv_ds": f"preact-resnet{n}-b" for n in CIFAR_DEPTHS},
    **{f"resnet_{n}": f"resnet{n}" for n in (*CIFAR_DEPTHS, *IMAGENET_DEPTHS)},
    **{f"resnet{n}_cifar": f"resnet{n}-b" for n in CIFAR_DEPTHS},
    **{name.removesuffix("-cls"): name for name in YOLO},
}


def resolve_model(name: str) -> tuple[str, dict[str, Any] | None]:
    """Turn what a user typed into an architecture's name and, for a YAML file, its definition.

    Raises:
        UserError: there is no such file, or none of ours, torchvision's and timm's networks has this name.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.exists() and path.stem in ARCHITECTURES:
            return path.stem, None
        return path.stem, read_yaml(path, "model")
    name = ALIASES.get(name, name)
    if name in ARCHITECTURES or name.startswith(own.PREFIX):
        return name, None
    from models.networks import external  # imports torchvision, which takes seconds

    return external.resolve(name, ARCHITECTURES), None


def build(spec: ModelSpec) -> nn.Module:
    """Build the dense network of a specification, with fresh weights, in training mode.

    Raises:
        UserError: the architecture is unknown or does not take these arguments.
    """
    if spec.definition is not None:
        model: nn.Module = build_yolo(spec.definition, spec.num_classes, spec.channels)
    elif spec.name in ARCHITECTURES:
        model = ARCHITECTURES[spec.name](spec.num_classes, spec.channels)
    elif spec.name.startswith(own.PREFIX):
        model = with_heads(own.build(spec.name))
        keep_contiguous_(model, torch.zeros(1, spec.channels, *spec.size))
    else:
        from models.networks import external

        model = with_heads(external.build(spec.name, spec.num_classes, spec.channels))
    return finish_(model, spec)


def definition_of(spec: ModelSpec) -> dict[str, Any] | None:
    """Return the YAML definition that a network is built from, or None if code builds it."""
    if spec.definition is not None:
        return spec.definition
    return load_definition_of(spec.name) if spec.name in YOLO else None


def finish_(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """Set what a specification holds beside the architecture: dropout, the normalisation layers' eps, plain weights.

    Raises:
        UserError: it names a layer that does not exist.
    """
    if spec.dropout is not None:
        set_dropout_(model, spec.dropout)
    modules = dict(model.named_modules())
    for name, eps in spec.norm_eps.items():
        if name not in modules:
            raise unknown("normalisation layer", name, modules)
        modules[name].eps = eps
    if spec.plain_weights:
        fold_weights_(model)
        model.train()
    return model


def set_dropout_(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer, in place."""
    if not 0 <= probability < 1:
        raise UserError(f"dropout is {probability}; it must lie in [0, 1)")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def cut_off(definition: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a YAML definition's first ``layers`` layers, followed by a classification head."""
    rows = rows_of(definition)
    if not 1 <= layers <= len(rows):
        raise UserError(f"cutoff is {layers}; this network has {len(rows)} layers, so it must lie in 1..{len(rows)}")
    body = [row for row in rows[:layers] if row[2] != "Classify"]
    kept = {key: value for key, value in definition.items() if key not in ("backbone", "head")}
    return {**kept, "layers": [*body, [-1, 1, "Classify", ["num_classes"]]]}
