"""Our own networks as parameters of a test: one of each builder runs with the suite, its siblings with ``-m exhaustive``."""

from __future__ import annotations

import pytest

from models.networks import ARCHITECTURES

# YOLOv5, v8 and 11 from YAML files, CIFAR-ResNets with both kinds of shortcut, ImageNet-ResNets with both kinds of block, VGG-16; then the
# other networks of HRank and Distiller.
ONE_OF_EACH = (
    *("yolov5n-cls", "yolov8n-cls", "yolo11n-cls", "resnet20", "resnet20-b", "resnet18", "resnet50", "vgg16-cifar"),
    *("googlenet-cifar", "densenet40", "mobilenet-v1", "mobilenet-v2-hrank"),
    *("preact-resnet20", "preact-resnet20-b", "preact-resnet18", "plain20", "plain20-nobn", "vgg11-bn-distiller"),
)


def architectures(quick=ONE_OF_EACH):
    """Return a parameter for each network of ours; those that are not ``quick`` are marked as exhaustive."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.exhaustive) for name in ARCHITECTURES]
