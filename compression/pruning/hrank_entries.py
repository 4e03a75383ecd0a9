"""The entries of a compress_rate for the networks of HRank+ and of HRank, as they count them (github.com/lmbxmu/HRankPlus, HRank)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.networks.googlenet import INCEPTIONS
from models.networks.mobilenet import STAGES
from models.networks.resnet import CIFAR_DEPTHS

Layout = list[tuple[str, ...]]
NAMESAKES = {"googlenet": "googlenet-cifar", "mobilenet_v2": "mobilenet-v2-hrank"}  # torchvision's -> HRank's of the same name
ANY_RATE = ""  # in place of a convolution whose rate HRank does not read


def _cifar_resnet(depth: int) -> Layout:
    blocks = (depth - 2) // 6
    mids = [(f"layer{stage}.{block}.conv1",) for stage in (1, 2, 3) for block in range(blocks)]
    return [("conv1",), ("layer1.0.conv2",), ("layer2.0.conv2",), *mids]


def _resnet50() -> Layout:
    outputs = [(f"layer{stage}.0.conv3",) for stage in (1, 2, 3)]
    mids = [(f"layer{s}.{b}.conv1", f"layer{s}.{b}.conv2") for s, depth in enumerate((3, 4, 6, 3), 1) for b in range(depth)]
    return [("conv1",), *outputs, *mids]


def _googlenet() -> Layout:
    blocks = [tuple(f"{name}.{layer}" for layer in ("branch3x3.3", "branch5x5.3", "branch5x5.6")) for name in INCEPTIONS]
    return [(), *blocks[:-1], (f"{INCEPTIONS[-1]}.branch5x5.3",)]


def _densenet40() -> Layout:
    layers = [[(f"dense{stage}.{i}.conv1",) for i in range(12)] for stage in (1, 2, 3)]
    return [(), *layers[0], ("trans1.conv1",), *layers[1], ("trans2.conv1",), *layers[2]]


def _arriving_in_densenet40() -> dict[int, Sequence[str]]:
    layout = ["conv1", *(modules[0] for modules in _densenet40()[1:])]
    return {13: layout[:13], 26: layout[13:26]}


def _mobilenet_v2() -> Layout:
    """Return the outputs of the stages, each with the hidden layers that read it, which have six times its channels."""
    layout: Layout = [()]
    first = 1
    for _, _, blocks, _ in STAGES:
        place = 3 if first == 1 else 6  # the first block does not expand
        readers = range(first + 1, min(first + blocks, 17) + 1)
        layout.append((f"features.{first}.conv.{place}", *(f"features.{block}.conv.0" for block in readers)))
        first += blocks
    return layout


# model -> the modules of each entry, as HRank+ counts them.
HRANK_ENTRIES: dict[str, Callable[[], Layout]] = {
    "vgg16-cifar": lambda: [(f"features.conv{i}",) for i in range(12)],
    "resnet50": _resnet50,
    **{f"resnet{depth}": (lambda depth=depth: _cifar_resnet(depth)) for depth in CIFAR_DEPTHS},  # type: ignore[misc]
    "googlenet-cifar": _googlenet,
    "densenet40": _densenet40,
    "mobilenet-v1": lambda: [(), *((f"features.{i}.3",) for i in range(12))],
    "mobilenet-v2-hrank": _mobilenet_v2,
}
# model -> entry -> the modules whose outputs its rate is a share of: a transition of DenseNet keeps a share of what arrives.
HRANK_ARRIVING: dict[str, Callable[[], dict[int, Sequence[str]]]] = {"densenet40": _arriving_in_densenet40}


def _convolutions_of_cifar_resnet(depth: int) -> list[str]:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range((depth - 2) // 6)]
    return ["conv1", *(f"{block}.conv{i}" for block in blocks for i in (1, 2))]


def convolutions_of(model_name: str) -> list[str]:
    """Return the modules of HRank's grammar, a rate each; none for networks where it has the same entries as HRank+'s."""
    if model_name in {f"resnet{depth}" for depth in CIFAR_DEPTHS}:
        return _convolutions_of_cifar_resnet(int(model_name.removeprefix("resnet")))
    if model_name == "resnet50":
        blocks = [(f"layer{stage}.{block}", block == 0) for stage, depth in enumerate((3, 4, 6, 3), 1) for block in range(depth)]
        layers = [[f"{block}.conv{i}" for i in (1, 2, 3)] + [f"{block}.downsample.0"] * first for block, first in blocks]
        return ["conv1", *(module for block in layers for module in block)]
    return [*(f"features.conv{i}" for i in range(12)), ANY_RATE] if model_name == "vgg16-cifar" else []
